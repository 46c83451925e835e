"""What Python does first in the processes of tests: it spares them what takes most of their time and is not tested.

The helpers that nnU-Net and our planning spawn, each of which would import PyTorch for a moment's work, are threads.
And Python looks for garbage less often, which takes a quarter of the time of importing PyTorch, and not at its end,
where it would look at all of PyTorch for two seconds.
"""

import atexit
import concurrent.futures
import gc
from multiprocessing.context import SpawnContext
from multiprocessing.pool import ThreadPool

gc.set_threshold(50_000, 50, 100)
atexit.register(gc.freeze)
SpawnContext.Pool = lambda self, *arguments, **options: ThreadPool(*arguments, **options)
concurrent.futures.ProcessPoolExecutor = lambda processes, *_: concurrent.futures.ThreadPoolExecutor(processes)
