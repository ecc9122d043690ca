"""The command line and the Python client: they speak HTTP and start processes, and import nothing of the service.

`cli` is what people type, `supervise` keeps the processes of `polyhead up` running, `client` is for Python code.
"""

from importlib.metadata import version

__version__ = version("polyhead")
