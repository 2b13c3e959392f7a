"""Schedule-free AdamW: an average of the weights in place of a falling learning rate.

Three sequences: z takes the steps, x is their weighted average and what to evaluate, y lies between them and is where
gradients are taken. The state of training holds y as its parameters and z in the optimizer; x follows from both.
"""

from typing import Any, Literal

from pydantic import Field

from .base import ChainConfig, Optimizer
from .schedule import ScheduleConfig


class ScheduleFreeAdamWConfig(ChainConfig):
    """Defazio et al. 2024 (arXiv 2405.15682, algorithm 1).

    y = (1 - beta1) z + beta1 x; z <- z - lr (g / (sqrt(v^) + eps) + decay y); x <- (1 - c) x + c z with c = w_t / sum of w_i.
    As in optax, the bias correction is v^'s and no part of the rate (the rate logged is the one used), and w_t is the
    square of the highest rate up to t. Meant for kind=constant with warmup; a falling rate is obeyed, but not needed. Keep
    parameters in float32: the sums of the average are held in their dtype.
    """

    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    schedule: ScheduleConfig = ScheduleConfig(kind="constant")
    beta1: float = Field(0.9, gt=0, lt=1)  # share of the average in y
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)

    def transform(self) -> Any:
        """Adam's rescaling without a first moment."""
        import optax

        return optax.scale_by_rms(decay=self.beta2, eps=self.eps, eps_in_sqrt=False, bias_correction=True)

    def build(self, *, num_steps: int) -> Optimizer:
        """The chain, averaged after clipping; `eval_params` gives x."""
        import optax

        schedule = self.schedule.build(num_steps=num_steps)
        # optax counts these from 1 and the rate's from 0: without the shift an update would be weighted by the next one's rate
        averaged = optax.contrib.schedule_free(optax.named_chain(*self.descent(schedule)), lambda count: schedule(count - 1), b1=self.beta1)
        tx = optax.named_chain(*self.clipping(), ("schedule_free", averaged))

        def eval_params(opt_state: Any, params: Any) -> Any:
            return optax.contrib.schedule_free_eval_params(opt_state["schedule_free"], params)

        return Optimizer(tx, schedule, eval_params, self.decays)
