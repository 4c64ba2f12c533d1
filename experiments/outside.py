"""How does an experiment change the model or the data from outside? As a variant of the model, and by swapping.

Files of the main road know nothing of experiments. What these need of them is general: `ATTENTION` in mmca.py,
`VARIANTS` and `ENCODERS` in visualchat.py, a model's list `fresh`. Next: lessons.py, with short ones.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path

from mmca import ATTENTION
from visualchat import VARIANTS, Variant

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Experiment:
    """A system that the paper names."""
    says: str                                       # what it is
    section: str                                    # of the paper, or "release" for what only its code does
    variant: Variant | None = None                  # what it changes in the model
    swaps: tuple[tuple, ...] = ()                   # pairs: something of the project, and what takes its place
    values: dict[str, object] = field(default_factory=dict)     # constants by name, such as {"zero.BETAS": …}
    options: tuple[str, ...] = ()                   # of train.py, beside those of the user
    attention: str = ""                             # the name of an attention of its own

    @property
    def in_results(self) -> bool:
        """Whether its results must name it: they, or the data that they learned from, differ."""
        return bool(self.swaps or self.variant)


def swap(old: object, new: object):
    """Put `new` in the place of `old` in every file of the project; experiments/ keeps `old`, to call it.

    A file that is imported later takes its names from files that are changed already. Not changed are tests/, and
    what was copied elsewhere before, such as the default value of an argument.
    """
    for module in list(sys.modules.values()):
        if Path(str(getattr(module, "__file__", ""))).parent in (ROOT, ROOT / "tiny"):
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


def apply(name: str, experiment: Experiment):
    """Change this process: from now on its models and its data are those of the experiment."""
    VARIANTS[name] = experiment.variant or Variant()
    if experiment.attention and experiment.attention not in ATTENTION:
        ATTENTION[experiment.attention] = None      # its own `through_layers` has the form
    for old, new in experiment.swaps:
        swap(old, new)
