"""Config files, used as `--config=NAME` or `--config=configs/NAME.py`; `common` explains every key."""
