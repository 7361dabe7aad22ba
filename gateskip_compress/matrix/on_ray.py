"""Quality jobs on a Ray cluster: Ray schedules, restarts nothing, and runs each job in a fresh process."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ..errors import GateSkipError


@contextmanager
def cluster(address: str, threads: int, collect: Callable[[Any], Any]) -> Iterator[Callable[[Any], "Future[Any]"]]:
    """A function that sends a job to the cluster at `address`; disconnects after the `with`.

    Args:
        address: As `ray.init` takes it, `auto` for the cluster of this machine.
        threads: Cores a job takes.
        collect: Runs a job, on the machine that Ray chose.

    Raises:
        GateSkipError: ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports] an extra
    except ImportError:
        raise GateSkipError("--ray needs ray: pip install 'gateskip-compress[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise GateSkipError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from None
    remote = ray.remote(num_cpus=threads, max_retries=0)(_guarded)
    try:
        yield lambda job: _told(remote.remote(collect, job).future(), ray.exceptions.RayError)
    finally:
        ray.shutdown()


def _guarded(collect: Callable[[Any], Any], job: Any) -> Any:
    return collect(job)


def _told(sent: "Future[Any]", failures: type[Exception]) -> "Future[Any]":
    """The same future, where a job that Ray lost is an outcome with that reason."""
    told: Future[Any] = Future()

    def tell(over: "Future[Any]") -> None:
        error = over.exception()
        if error is None:
            told.set_result(over.result())
        elif isinstance(error, failures):
            told.set_result(([], f"lost by Ray: {str(error).strip().splitlines()[-1]}"))
        else:
            told.set_exception(error)

    sent.add_done_callback(tell)
    return told
