import sys
from sftkit.cli import main

sys.exit(main())
