"""Config files: `--config=configs/NAME.py`; `common` explains every key."""
