"""`python -m app.jobs FOLDER TASKS PID`: the worker process."""

import sys

from app.jobs.worker import main

sys.exit(main(sys.argv[1:]))
