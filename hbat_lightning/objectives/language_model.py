"""The language-model loss on plain texts: what keeps a policy's language while something else trains it."""

from __future__ import annotations

from torch import Tensor

from hbat_lightning.data.kinds import TEXTS
from hbat_lightning.objectives.sft import SFTModule, loss_of_each
from hbat_lightning.policy import Policy
from hbat_lightning.sums import Sums


class LanguageModelModule(SFTModule):
    """Continued pre-training: negative log-likelihood of every token of a text, a mean over the window's tokens.

    In a joint run with PPO it is the second term of InstructGPT's PPO-ptx (Ouyang et al. 2022, eq. 2), RLHF+pt of the Hbat
    paper. Rows with a column ``text``, or the lines of a ``.txt`` file, are learnt whole, with the eos behind them and no
    template, in pieces of at most ``max_length`` tokens. Of data in any other format the prompts are the texts, as generation
    would start from them.
    """

    rows = TEXTS

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return "language model: negative log-likelihood of every token of a text, mean over a window"

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """Loss per token; no text is expected to be guessed whole."""
        return {"loss": loss_of_each(policy.score(inputs))}
