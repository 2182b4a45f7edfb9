"""Trainings on a Ray cluster: `train`, one run over the workers of Ray Train; and tasks that outlive their workers."""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from pspinal_jax.environment import jax_settings, set_jax, versions
from pspinal_jax.errors import PSpinalError, RunError, UsageError
from pspinal_jax.files import differences
from pspinal_jax.progress import absl_quietened
from pspinal_jax.recipes import Recipe
from pspinal_jax.runs.run import Run, settle
from pspinal_jax.runs.train import train as train_recipe
from pspinal_jax.runs.train import work_directory

if TYPE_CHECKING:
    from ray.train import RunConfig, ScalingConfig

Name = TypeVar("Name")

MAX_RESTARTS = 3
"""Default number of restarts of a group of workers, and of a task whose worker is lost."""


def train(
    recipe: Recipe | str | Path,
    scaling_config: "ScalingConfig",
    *,
    run_config: "RunConfig | None" = None,
    **changes: Any,
) -> Run:
    """Run `pspinal_jax.train` as one run on the workers of Ray Train's JaxTrainer.

    If a worker is lost, Ray restarts the group, and the run resumes from its newest checkpoint. With the same number of
    workers, the result equals that of an uninterrupted run. Without an earlier `ray.init`, Ray connects to the cluster
    in the variable RAY_ADDRESS, or starts one on this machine.

    Args:
      recipe: as for `pspinal_jax.train`.
      scaling_config: number and resources of the workers, which compute on CPU unless it has `use_gpu` or `use_tpu`.
      run_config: by default `MAX_RESTARTS` restarts, with Ray's state in the folder .ray next to the run directory.
      **changes: as for `pspinal_jax.train`. All machines must see `workdir` and the data under the same paths.

    Returns:
      The finished run.

    Raises:
      UsageError: if Ray is not installed, or like `pspinal_jax.train`.
      PSpinalError: like `pspinal_jax.train`, once the restarts are used up.
      RunError: if workers were lost more often.
    """
    _require_ray()
    from ray.train import FailureConfig, RunConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    settled, options = settle(recipe, changes)
    workdir = work_directory(settled, options).absolute()
    config = run_config or RunConfig(
        storage_path=str(workdir.parent / ".ray"), failure_config=FailureConfig(max_failures=MAX_RESTARTS)
    )
    accelerated = scaling_config.use_gpu or scaling_config.use_tpu
    # JAX's own service for preemption notices would catch SIGTERM first.
    variables = {"JAX_ENABLE_PREEMPTION_SERVICE": "false"} | ({} if accelerated else {"JAX_PLATFORMS": "cpu"})
    environment = dict(config.worker_runtime_env)
    environment["env_vars"] = variables | environment.get("env_vars", {})
    trainer = JaxTrainer(
        _train_as_worker,
        train_loop_config={
            "recipe": settled,
            "options": dataclasses.replace(options, workdir=workdir),
            "folder": Path.cwd(),
            "settings": _settings(),
        },
        # Without an accelerator JaxTrainer's own default joins nobody; `use_gpu` does, on the platform above.
        jax_config=None if accelerated else JaxConfig(use_gpu=True),
        scaling_config=scaling_config,
        run_config=dataclasses.replace(config, worker_runtime_env=environment),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        # Ray wraps what a worker raised, together with its traceback, as the wrapper's arguments.
        failures = getattr(error, "worker_failures", {}).values()
        causes = [cause for failure in failures for cause in failure.args if isinstance(cause, PSpinalError)]
        reason = str(error).strip().rpartition("\n")[2]
        lost = RunError(f"the workers of {workdir} failed too often, the last time with {reason}; call again to go on")
        raise causes[0] if causes else lost from error
    return Run(workdir)


@absl_quietened()
def _train_as_worker(given: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # Ray changes the folder; relative paths mean the caller's, where it is here too
        os.chdir(given["folder"])
    _take(given["settings"])
    train_recipe(given["recipe"], given["options"])


@contextlib.contextmanager
def cluster(address: str | None = None, cores: int | None = None) -> Iterator[None]:
    """In a `with`, be connected to a Ray cluster; a process that is connected already stays so.

    Args:
      address: of the cluster; by default the variable RAY_ADDRESS, or else one of this machine that ends with the
        `with`.
      cores: of that one, by default all.

    Raises:
      UsageError: if Ray is not installed.
      RunError: if there is no such cluster.
    """
    _require_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try for many minutes
            socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=20).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX's about forks: what Ray forks becomes another program at once
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray's own print a stack trace and abort
                signal.signal(number, handler)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"the Ray cluster {address} cannot be reached: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def run_tasks(
    function: Callable[..., Any],
    shared: Any,
    calls: Sequence[Sequence[Any]],
    names: Sequence[Name],
    at_a_time: int | None = None,
) -> Generator[tuple[Name, Any], None, None]:
    """Yield (name, ``function(shared, *call)``) as the calls end, each a task on one core of the cluster.

    A task whose worker or machine is lost runs again, up to `MAX_RESTARTS` times. Tasks compute on CPU, under the
    settings of JAX that this process has. What `function` raises there is raised here.

    Args:
      function: one that a module holds.
      shared: sent to each machine once.
      calls: further arguments; the tasks begin in this order.
      names: what each call is handed back with.
      at_a_time: how many run at a time; by default as many as the cluster has cores.

    Raises:
      RunError: if a task's workers were lost too often, or a worker has other versions of what decides numbers.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=MAX_RESTARTS)(_run_task)
    sent, settings = ray.put(shared), _settings()
    left, running = list(zip(names, calls, strict=True))[::-1], dict[Any, Name]()
    try:
        while left or running:
            while left and len(running) < (at_a_time or len(calls)):
                name, call = left.pop()
                running[task.remote(function, settings, sent, *call)] = name
            (done,), _ = ray.wait(list(running))
            yield running.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"a worker was lost {MAX_RESTARTS + 1} times with the same training: {reason}") from error
    finally:
        for unfinished in running:
            ray.cancel(unfinished)


def _run_task(function: Callable[..., Any], settings: Mapping[str, Any], *call: Any) -> Any:
    jax.config.update("jax_platforms", "cpu")
    _take(settings)
    return function(*call)


def _settings() -> dict[str, Any]:
    return {"jax": jax_settings(), "versions": _versions()}


def _versions() -> dict[str, str]:
    return {name: version for name, version in versions().items() if name != "python"}  # Ray looks at that itself


def _take(settings: Mapping[str, Any]) -> None:
    """Compute under the settings of the process that sent them; raises RunError if the versions differ."""
    wrong = differences(_versions(), settings["versions"], lambda name, here, there: f"{name} {here}, expected {there}")
    if wrong:
        raise RunError(f"a machine of the Ray cluster has {', '.join(wrong)}; install the same versions on all")
    set_jax(settings["jax"])


def _require_ray() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UsageError("Ray is not installed; in the checkout: pip install '.[ray]'") from None
