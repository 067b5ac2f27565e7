"""What to say where a GPU's memory was full before a run had made an update: what the plan knows that would fit it."""

from __future__ import annotations

import logging

from dpo.common.errors import UserError
from dpo.common.words import first_line
from dpo.models.ready import pick_device
from dpo.planning import cuda, fitting, recompute, work
from dpo.planning.asked import Asked
from dpo.planning.cuda import GIB
from dpo.planning.dry import TrainStep
from dpo.planning.recompute import Memory
from dpo.planning.work import Dry
from dpo.settings.config import Config
from dpo.training.parallel import Processes

PLANNED = 600.0  # seconds that the other processes wait for the one that plans

log = logging.getLogger("dpo")


def instead(config: Config, train_step: TrainStep, processes: Processes) -> str:
    """What would have fitted the GPU of a run of `config`, as the end of a message; "" where that is not known.

    Of several processes whose memory was full one says it. Raises Stopped or Elsewhere in the others.
    """
    memory = recompute.memory_of(pick_device(processes.device(config.runtime.device)))
    if memory is None:
        return ""
    if not processes.claims("out of memory"):
        processes.await_end(PLANNED)
        return ""
    log.warning("out of GPU memory before an update was made: planning what would fit (Ctrl-C: leave it)")
    try:
        with work.quietly():
            said = what_fits(config, work.planner(train_step, processes.count), memory, processes.count)
    except KeyboardInterrupt:
        return ""
    except Exception as error:  # of libraries, on tensors without content: what is to be said is that memory was full
        log.warning("what would fit cannot be planned (%s)", first_line(error))
        return ""
    return f"; {said}" if said else ""


def what_fits(config: Config, dry: Dry, memory: Memory, processes: int = 1) -> str:
    """The cheapest changes with which a run fits a GPU with this memory, in words for a message; "" where no plan can be made.

    processes: that train together. Where the plan says that it fits as it is, the words say what that means.
    """
    asked = Asked(processes=processes)
    try:
        planned = work.plan(work.prepared(config), asked, dry)
        if planned.peak <= memory.room:
            return (
                f"the plan says that {planned.peak / GIB:.1f} GiB are enough, and {memory.room / GIB:.1f} GiB were there: it "
                "counts too little here, or another program took memory meanwhile"
            )
        found = fitting.cheapest(planned.config, asked, dry, memory.room, lambda line: None)
    except UserError:
        return ""
    others, said = memory.total - cuda.OWN - memory.room, []
    if others > cuda.OWN and planned.peak <= memory.room + others:
        said.append(
            f"another program holds {others / GIB:.1f} GiB of this GPU: without it the plan's {planned.peak / GIB:.1f} GiB would fit"
        )
    room = f"{memory.room / GIB:.1f} GiB"
    if found is None:
        said.append(f"the plan knows no change that fits {room}")
    else:
        flags = "; ".join(one.flags for one in found.changes)
        said.append(f"by the plan this would fit {room}: {flags} ({found.plan.peak / GIB:.1f} GiB)")
    return "; ".join(said)
