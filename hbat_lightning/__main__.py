"""``python -m hbat_lightning`` is ``hbat``."""

from hbat_lightning.cli import main

if __name__ == "__main__":
    main()
