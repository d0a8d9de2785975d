"""``python -m cellimg_dask`` is the command ``cellimg``."""

from cellimg_dask.cli import main

if __name__ == "__main__":
    main(prog_name="cellimg")
