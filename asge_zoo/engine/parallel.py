"""What several ranks need beside the loop: that they are alike, data in turn, one voice, and torchrun's launcher."""

import contextlib
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from asge_zoo.compiler.check import parts
from asge_zoo.data.base import Loader
from asge_zoo.engine.device import git_revision, package_versions
from asge_zoo.engine.run_dir import job_of
from asge_zoo.errors import CheckpointError, DataError, RankError, SpecError, ZooError
from asge_zoo.ranks import Ranks, here, is_first, job, launched, lost_rank, restarts, usable_cpus
from asge_zoo.spec import Spec

HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # what the launcher passes on
PER_CPU = 4  # ranks, at most
QUIET_FOR = 10.0  # seconds in which the launcher ends a rank that is to say nothing


def check_alike(ranks: Ranks, spec: Spec) -> None:
    """Refuse ranks whose spec, components or packages are not the first one's; every rank must call it.

    Raises:
        SpecError: names the rank, what differs, and both values.
    """
    mine: dict[str, Any] = {
        "spec": spec.digest(),
        "python": platform.python_version(),
        "git revision": git_revision(),
        **package_versions(),
        **{f"{origin.component} {origin.kind}": f"{origin.distribution} {origin.version}" for origin in spec.plugins},
    }
    first, *others = ranks.gather((mine, here()))
    for other, where in others:
        for key in {**first[0], **other}:
            if first[0].get(key) != other.get(key):
                raise SpecError(
                    f"{where} has {key} {other.get(key)}, and {first[1]} {first[0].get(key)}; install the same on all "
                    f"machines"
                )


def check_restart(run_dir: str | Path | None) -> bool:
    """Whether torchrun restarts the ranks of a run that this job began, so that they go on from its last checkpoint.

    Raises:
        CheckpointError: it restarts them, and a default run directory would not be found again.
    """
    if restarts() == 0:
        return False
    if run_dir is None:
        raise CheckpointError("a restart by torchrun needs to know where to go on: give --run-dir with --max-restarts")
    return job_of(Path(run_dir)) == job()


def open_loader(spec: Spec, root: Path, device: torch.device, ranks: Ranks) -> Loader:
    """The spec's loader for this rank; the first rank opens it first, and downloads what is missing.

    Raises:
        SpecError: there are more ranks than images to share.
        DataError: see `Dataset.loader`; or the ranks do not read the same.
    """
    data = parts(spec).data
    for field in ("batch_size", "validation"):
        if getattr(data, field) < ranks.shard.world_size:
            raise SpecError(
                f"data.{field}: {getattr(data, field)} is fewer than the {ranks.shard.world_size} ranks; raise it, or "
                f"start fewer"
            )
    if not ranks.first:
        ranks.share(None)
    loader = data.loader(root, seed=spec.train.seed, device=device, shard=ranks.shard)
    if ranks.first:
        ranks.share(None)
    first, *others = ranks.gather((f"{loader.described}, {loader.steps()} steps an epoch, {device.type}", here()))
    for opened, where in others:
        if opened != first[0]:
            raise DataError(f"{where} reads {opened}, and {first[1]} {first[0]}; give all machines the same")
    return loader


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of ranks that end by the same error, or because another one did, let one speak: others are ended meanwhile.

    Raises:
        RankError: another rank is gone, and nothing has ended this one.
    """
    if not launched():
        yield
        return
    try:
        yield
    except ZooError as error:
        if not is_first():
            _await_end()
            error.args = (f"{here()}: {error}",)
        raise
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        _await_end()
        raise RankError(f"{here()}: another rank is gone; what that one said tells why. Go on with --resume") from error


def _await_end() -> None:
    """Leave the launcher time to end this process, whose words would add nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(QUIET_FOR)


def launch(nproc: int, arguments: Sequence[str], device: str | None) -> int:
    """Run a command line of asge-zoo as `nproc` ranks on this machine, by torchrun's own launcher; its exit code.

    Raises:
        RankError: a rank was killed.
        SpecError: torchrun has started this process already, or the machine can't serve so many.
    """
    if launched():
        raise SpecError("--nproc: torchrun has started the ranks already; leave it out")
    most = PER_CPU * usable_cpus()
    if nproc > most:
        raise SpecError(f"--nproc: {nproc} ranks are more than {usable_cpus()} CPUs can serve; take {most} or fewer")
    gpus = torch.cuda.device_count()
    if nproc > gpus > 0 and not (device or "cuda").startswith("cpu"):
        raise SpecError(f"--nproc: {nproc} ranks need a GPU each, and there are {gpus}; take fewer, or --device cpu")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // nproc)))
    logging.disable(logging.CRITICAL)  # the ranks speak for themselves
    options = ["--standalone", f"--nproc-per-node={nproc}", f"--signals-to-handle={HANDLED}"]
    try:
        run(parse_args([*options, "-m", "asge_zoo", *arguments]))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise RankError(
            f"rank {rank} was killed by {name}, perhaps for want of memory; go on with the same command and --resume"
        ) from None
    return 0
