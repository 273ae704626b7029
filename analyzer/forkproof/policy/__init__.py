"""What a team has decided: which findings count, which are known and until when, and what is new.

    config (forkproof.toml) → apply → baseline; compare is what baseline and `forkproof diff` share

Functions of reports: a policy never changes what was found, only what counts.
"""

from forkproof.policy.apply import apply
from forkproof.policy.compare import Comparison, against, compare
from forkproof.policy.config import Policy, Rule, load

__all__ = ["Comparison", "Policy", "Rule", "against", "apply", "compare", "load"]
