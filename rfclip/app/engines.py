"""One kind of work over many tasks: by a worker in this process, or by the workers of a Ray cluster.

A worker is made once per process and then called with one task at a time. Tasks and results are JSON values, and doing
a task twice must have the same effect as doing it once: Ray hands the task of a worker that died to another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator

from rfclip.extras import require

Worker = Callable[[dict], dict]

CORES = 4  # CPU cores per worker, unless the number of workers is given
RETRIES = 5  # of a task whose worker died, before giving up
BLOCKS = 10_000  # the most pieces that Ray splits the tasks into


class Engine:
    """Workers in this process; `here` is the device of its models."""

    def __init__(self, here: str) -> None:
        self.here = here

    def results(self, here: Callable[[], Worker], there: Callable[[], Worker], tasks: list[dict]) -> Iterator[dict]:
        """The results, in any order.

        Args:
            here: makes a worker in this process.
            there: makes one in another: picklable, as `functools.partial(Class, ...)` is.
            tasks: with absolute paths, if the worker is in another process.

        Raises:
            ValueError: on Ray, a worker failed with an error, or a task's workers kept dying.
        """
        yield from map(here(), tasks)


class RayEngine(Engine):
    """Workers on a Ray cluster; models in this process, on the CPU, check input and draw a run's worst pictures."""

    def __init__(self, workers: int, share: dict[str, int]) -> None:
        super().__init__("cpu")
        self._workers, self._share = workers, share

    def results(self, here: Callable[[], Worker], there: Callable[[], Worker], tasks: list[dict]) -> Iterator[dict]:
        import ray

        if not tasks:
            return
        rows = [{"task": json.dumps(task)} for task in tasks]
        workers = ray.data.ActorPoolStrategy(size=min(self._workers, len(rows)))
        done = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map(
            _Actor, fn_constructor_args=(there,), compute=workers, max_task_retries=RETRIES, **self._share
        )
        try:
            for row in done.iter_rows():
                for text in json.loads(row["warnings"]):
                    warnings.warn(text, stacklevel=2)
                if row["error"]:
                    raise ValueError(row["error"])
                yield json.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise ValueError(f"Ray could not continue: {error}") from error


def start(
    name: str = "local", workers: int | None = None, device: str = "cpu"
) -> contextlib.AbstractContextManager[Engine]:
    """An engine, for a `with` statement; arguments are checked at once.

    Args:
        name: "local", or "ray": the Ray cluster that this process finds, or else a local one.
        workers: for "ray", how many; None: one per GPU, or one per four CPU cores.
        device: of the models; for "ray" "cpu", whose cores are shared out, or "cuda", which gives each worker a GPU.

    Raises:
        ValueError: an argument is out of range, Ray is not installed, or the cluster is too small.
    """
    if name not in ("local", "ray"):
        raise ValueError(f"--engine {name}: expected local or ray")
    if workers is not None and (name == "local" or workers < 1):
        raise ValueError(f"--workers {workers}: expected at least 1, with --engine ray")
    if name == "local":
        return contextlib.nullcontext(Engine(device))
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: --engine ray takes cpu or cuda; Ray decides which GPU a worker gets")
    require("--engine ray", "ray", "ray", "pyarrow")
    return _on_ray(workers, device)


@contextlib.contextmanager
def _on_ray(workers: int | None, device: str) -> Iterator[Engine]:
    # Unless the user says otherwise, no usage statistics are sent, and a warning about the arguments of actors is
    # hidden, which does not apply while this process lives.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    own = not ray.is_initialized()
    handler = signal.getsignal(signal.SIGTERM)
    if own:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own handler aborts the process
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield RayEngine(*_share(nodes, workers, device))
    finally:
        if own:
            ray.shutdown()


def _share(nodes: list[dict[str, float]], workers: int | None, device: str) -> tuple[int, dict[str, int]]:
    """How many workers there are, and what each takes: a GPU, or an equal share of the cores."""
    if device == "cuda":
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if not gpus or (workers or 1) > gpus:
            raise ValueError(f"--device cuda: {workers or 1} workers need a GPU each, and this cluster has {gpus}")
        return workers or gpus, {"num_gpus": 1}
    cores = [int(node.get("CPU", 0)) for node in nodes]
    wanted = workers or sum(max(1, c // CORES) for c in cores if c)
    fitting = [share for share in range(1, max(cores) + 1) if sum(c // share for c in cores) >= wanted]
    if not fitting:
        raise ValueError(f"--workers {wanted}: a worker needs a CPU core, and this cluster has {sum(cores)}")
    return wanted, {"num_cpus": fitting[-1]}


class _Actor:
    """What Ray runs: a worker whose warnings and input errors travel back with the results."""

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._work, self._error = None, ""
        with self._reported():
            self._work = make()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        result, said = None, []
        if self._work is not None:
            with warnings.catch_warnings(record=True) as caught, self._reported():
                warnings.simplefilter("always", UserWarning)
                result = self._work(json.loads(row["task"]))
            said = [str(warning.message) for warning in caught if warning.category is UserWarning]
        return {"result": json.dumps(result), "warnings": json.dumps(said), "error": self._error}

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch out of memory: RuntimeError
            self._error = str(error)
