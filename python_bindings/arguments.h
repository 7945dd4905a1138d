// How arguments of the CPU kernels come from Python: addresses as integers, tensors as pairs
// (address, dtype) in a flat tuple. Address 0 stands for none.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>

#include "../csrc/cpu/kernels.h"

inline int64_t integer(const pybind11::tuple& values, size_t i) {
    return pybind11::cast<int64_t>(values[i]);
}

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

inline Dense dense(const pybind11::tuple& tensors, size_t i) {
    return {pointer<char>(integer(tensors, 2 * i)), static_cast<int>(integer(tensors, 2 * i + 1))};
}

inline void check_memory(bool done) {
    if (!done) throw std::bad_alloc();
}
