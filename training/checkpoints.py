"""Checkpoints that are whole or not there: written aside, sealed and renamed, and verified before they are loaded.

``AtomicCheckpoints`` goes before ``transformers.Trainer`` among a class's bases. Every rank writes into a hidden
folder, the main one seals it with a manifest, renames it to ``checkpoint-N``, and only then removes the oldest. A run
that is killed at any moment resumes from the newest whole checkpoint, bit for bit, as long as a sample is the same
whenever it is read.
"""

from __future__ import annotations

import errno
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import accelerate
import torch
import transformers
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from sp_fast.errors import TrainingError, first_line
from sp_fast.training.epochs import SamplersOfTheEpoch, check_order
from sp_fast.training.manifest import Facts, Manifest, sync_folder, verify, write_manifest
from sp_fast.training.run_folder import checkpoints_of, newest_complete, remove, remove_leftovers, set_aside, staging
from sp_fast.training.sharded import load_local_state, local_state
from sp_fast.training.trained import TRAINED, load_trained, save_trained, trained_bytes
from sp_fast.version import __version__

logger = logging.getLogger("sp_fast")

_SLACK_BYTES = 2**24  # scheduler, random states, trainer state, names
_STATE, _SCHEDULER = "trainer_state.json", "scheduler.pt"
_PICKLE = "training_args.bin"  # the Trainer's, which nothing reads
# Settings of the Trainer with which a checkpoint is less than the run.
_UNFIT = {
    "save_only_model": "leaves the optimizer out of checkpoints",
    "load_best_model_at_end": "loads weights past the manifest",
    "auto_find_batch_size": "changes the batches in the middle of a run",
    "dataloader_persistent_workers": "draws other random numbers in a resumed run than in one that went through",
    "ignore_data_skip": "gives a resumed run samples that it has had",
    "save_on_each_node": "needs a rename on every node: let the nodes share the folder",
    "push_to_hub": "uploads checkpoints before they are whole: upload the finished model",
}
T = TypeVar("T")


class AtomicCheckpoints:
    """Gives a Trainer checkpoints that are whole or not there; see the module.

    ``fingerprint`` is for the Trainer to set: whatever a resumed run must share with the one that saved, as values that
    JSON holds (data files, batch, seed, schedule). The ranks' folder is one: nodes share it.
    """

    fingerprint: Mapping[str, Any] = MappingProxyType({})
    _staging: Path | None = None  # while a save goes on, the folder that stands for the run's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SamplersOfTheEpoch())
        self._whole: list[Path] = []  # checkpoints of this run up to its present step, oldest first

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in the Trainer; ``True`` means the newest whole checkpoint of the output folder.

        Raises:
            TrainingError: a setting or a sampler with which checkpoints are less than the run; a checkpoint that is not
                whole, or of another run; checkpoints in the folder of a run that does not resume.
        """
        for name, reason in _UNFIT.items():
            if getattr(self.args, name):
                raise TrainingError(f"{name}={getattr(self.args, name)} {reason}: leave it out")
        check_order(self.get_train_dataloader())
        folder, self._whole = self._together(partial(self._begin, resume_from_checkpoint), on_main_only=True)
        if folder is not None:
            state = TrainerState.load_from_json(str(folder / _STATE))
            # The Trainer would take one step more. With DeepSpeed only it can load what it saved.
            if state.global_step >= state.max_steps and not self.is_deepspeed_enabled:
                self._load_from_checkpoint(str(folder))
                self.state = state
                return TrainOutput(state.global_step, float("nan"), {})
        return super().train(None if folder is None else str(folder), *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the Trainer; into a checkpoint go the trained tensors alone, unless DeepSpeed writes it."""
        if self._staging is None or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_trained(self.model, Path(output_dir, TRAINED), writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint, TRAINED))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """With FSDP each process writes its share. The Trainer would write frozen weights too, or with PEFT none but
        the adapters, and what it writes is unpickled without a guard."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(local_state(self.optimizer), Path(output_dir, self._share))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _nothing_is_run(checkpoint):
            if not self.is_fsdp_enabled or checkpoint is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            share = torch.load(Path(checkpoint, self._share), map_location="cpu", weights_only=True)
            load_local_state(self.optimizer, share)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, _SCHEDULER), weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _nothing_is_run(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Raises TrainingError on every rank where one of them failed; older checkpoints are then as they were."""
        final = self._run / f"checkpoint-{self.state.global_step}"
        write = partial(super()._save_checkpoint, model, trial)
        self._staging = staging(final)
        try:
            self._together(self._make_room, on_main_only=True)
            self._together(write)
            self._together(partial(self._seal, final), on_main_only=True)
        except TrainingError as error:
            free = _free(self._run)
            self._together(partial(shutil.rmtree, self._staging, ignore_errors=True), on_main_only=True)
            raise TrainingError(f"{final} was not saved, as {error} ({free}): mend that, and {self._way_on}") from error
        finally:
            self._staging = None
        self._whole.append(final)
        self._together(self._remove_oldest, on_main_only=True)

    def _begin(self, resume: str | bool | None) -> tuple[Path | None, list[Path]]:
        remove_leftovers(self._run)
        there = checkpoints_of(self._run)
        if not resume:
            if there:
                raise TrainingError(f"{self._run} holds {there[max(there)].name}: resume, or train in another folder")
            return None, []
        folder = Path(resume).absolute() if resume is not True else self._newest()  # a link is refused
        manifest = verify(folder)
        self._compare(folder, manifest)
        return folder, [there[step] for step in sorted(there) if step <= manifest.facts.step]

    def _newest(self) -> Path:
        found = newest_complete(self._run)
        if found.folder is None:
            raise TrainingError(f"{self._run} holds no checkpoint to resume from: begin without")
        for _, reason in found.rejected:
            logger.warning("%s", reason)
        logger.info("resuming from %s", found.folder)
        return found.folder

    def _compare(self, folder: Path, manifest: Manifest) -> None:
        old, new = manifest.facts, self._facts(manifest.facts.step)
        was = {"world size": old.world_size, **old.fingerprint}
        now = {"world size": new.world_size, **new.fingerprint}
        changed = [
            f"{name} is {now.get(name)!r:.200}, and was {was.get(name)!r:.200}"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]
        if changed:
            raise TrainingError(
                f"{folder} is of another run than this one: {'; '.join(changed)}: resume with what it was saved with, "
                "or begin anew in another folder"
            )
        if old.versions != new.versions:
            logger.warning("saved with %s, resumed with %s: last bits may differ", old.versions, new.versions)

    def _facts(self, step: int) -> Facts:
        packages = {"sp_fast": __version__, "accelerate": accelerate.__version__}
        versions = packages | {"torch": torch.__version__, "transformers": transformers.__version__}
        as_stored = json.loads(json.dumps(dict(self.fingerprint)))  # tuples become lists, keys strings
        return Facts(step, self.args.world_size, as_stored, versions)

    def _make_room(self) -> None:
        self._run.mkdir(parents=True, exist_ok=True)
        if self._staging.exists():
            shutil.rmtree(self._staging)
        need, free = trained_bytes(self.model) + _SLACK_BYTES, shutil.disk_usage(self._run).free
        if free < need:
            raise OSError(errno.ENOSPC, f"it needs {need / 1e9:,.3f} GB")

    def _seal(self, final: Path) -> None:
        written = self._staging / final.name
        (written / _PICKLE).unlink(missing_ok=True)
        ranks = range(self.args.world_size)
        needed = [_STATE, *(f"rng_state_{rank}.pth" if len(ranks) > 1 else "rng_state.pth" for rank in ranks)]
        shares = [_share(rank) for rank in ranks] if self.is_fsdp_enabled else ["optimizer.pt"]
        needed += [] if self.is_deepspeed_enabled else [TRAINED, *shares, _SCHEDULER]
        if missing := [name for name in needed if not (written / name).is_file()]:
            raise FileNotFoundError(errno.ENOENT, "the Trainer did not write it", missing[0])
        write_manifest(written, self._facts(self.state.global_step))
        set_aside(final)
        written.rename(final)
        sync_folder(final.parent)
        self._staging.rmdir()

    def _remove_oldest(self) -> None:
        limit = self.args.save_total_limit or len(self._whole)
        while len(self._whole) > limit:
            oldest = self._whole.pop(0)
            try:
                remove(oldest)
            except OSError as error:
                raise TrainingError(
                    f"{oldest} is one more than save_total_limit={limit} and cannot be removed ({error}): mend that, "
                    f"and {self._way_on}"
                ) from error

    @property
    def _run(self) -> Path:
        return Path(self.args.output_dir).resolve()

    @property
    def _share(self) -> str:
        return _share(self.args.process_index)

    @property
    def _way_on(self) -> str:
        return f"resume from {self._whole[-1]}, the last whole one" if self._whole else "begin anew: none was saved yet"

    def _together(self, action: Callable[[], T], on_main_only: bool = False) -> T:
        """Runs an action on every rank, or on the main one for all, and waits: what fails on one is raised on each.

        Returns the main rank's result. Without this, the others would wait for a rank that has stopped.
        """
        result, problem, cause = None, None, None
        if self.is_world_process_zero() or not on_main_only:
            try:
                result = action()
            except Exception as error:  # noqa: BLE001 - writers raise errors of many kinds for a full disk
                cause, problem = error, str(error) if isinstance(error, TrainingError) else _said(error)
        outcomes = gather_object([(result, problem)])
        for rank, (_, said) in enumerate(outcomes):
            if said is not None:
                raise TrainingError(said if len(outcomes) == 1 else f"{said} (rank {rank})") from cause
        return outcomes[0][0]


@contextmanager
def _nothing_is_run(checkpoint: str | None) -> Iterator[None]:
    """A manifest says that files are as they were written, not who wrote them."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"{checkpoint} holds something else than tensors and numbers, which training never writes; nothing of it "
            "was run: resume from another checkpoint"
        ) from error


def _share(rank: int) -> str:
    return f"optimizer_{rank}.pt"


def _free(run: Path) -> str:
    """For messages: of a full disk, torch.save only says that a file has not the length that it should have."""
    try:
        return f"the disk has {shutil.disk_usage(run).free / 1e9:,.3f} GB free"
    except OSError:
        return "how much the disk has free, it does not say"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
