"""`python -m tasks.documents SOCKET OWNER`: reads files for a process; tasks/bulkhead.py starts it."""

from __future__ import annotations

import sys

from tasks.documents.orders import serve

if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
