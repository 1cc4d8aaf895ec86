"""`python -m batchinfer` is the same as `batchinfer`."""

from batchinfer.cli import main

if __name__ == "__main__":
    main()
