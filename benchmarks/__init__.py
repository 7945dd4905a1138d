"""Speed and memory of the ops against what people run today; `report.py` writes README's tables."""
