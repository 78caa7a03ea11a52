"""`python -m keras_iris`."""

import sys

from keras_iris.cli import main

if __name__ == "__main__":
    sys.exit(main())
