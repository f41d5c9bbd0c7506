"""`optim.lr: auto`: a learning rate from the model's width, the adapter's scale and the method.

For demonstrations 5e-4 (2000 / width)^0.781 32 / (s rank), where the adapter is s B A: the LoRA
rate, ten times that of full fine-tuning and the same for every rank where s = alpha / rank, of
Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025), with their exponent for Llama.
They write alpha = 32; for others the first steps, in which B is small, move W by s times the rate.
Half of it for methods with group advantages, which break down on the lab at the whole of it.

Against rates that were tuned here (examples/lab_study.md): on the lab, of width 128, the rule gives
4.3e-3, and the best rates were 4e-3 for SFT, SFT on mixed demonstrations and DFT, 8e-3 for ASFT and
1e-3 for PSFT, which was as good at 4e-3. For GFT and GRPO it gives 2.1e-3, a quarter of the best
rate in runs of 30 steps, of which some broke down. Where it is off: with the source's exponent for
Qwen, 0.0775, the lab would get 6.2e-4, far too low, but a Qwen of width 896 5.3e-4 in place of
9.4e-4; batch size, length of the training and quantisation are not in it.

On SmolLM2-135M (width 576; ten steps on word problems, one seed a rate, 80 problems) the rule
gives 1.3e-3 for SFT, which solved 5, 7, 11, 12 and 9 problems at 2.5e-4, 5e-4, 1e-3, 2e-3 and 4e-3:
the rule lies between the best two. GFT gets 6.6e-4 and solved 6, 2 and 2 at 2.5e-4, 5e-4 and 1e-3,
the base 3: a lower rate may be better, but chance alone could do that.
"""

from __future__ import annotations

import math

from gft_lite.recipe.schema import Recipe

RATE, WIDTH, EXPONENT, ALPHA = 5e-4, 2000, 0.781, 32


def automatic_rate(recipe: Recipe, width: int, *, group_advantages: bool) -> float:
    """The rate of the rule, with two digits; `width` is the model's hidden size."""
    lora = recipe.policy.lora
    scale = lora.alpha * (math.sqrt(lora.rank) if lora.use_rslora else 1)  # s times the rank.
    rate = RATE * (WIDTH / width) ** EXPONENT * ALPHA / scale
    return float(f"{rate / (2 if group_advantages else 1):.1e}")


def with_rate(recipe: Recipe, rate: float) -> Recipe:
    """The recipe with a number as its learning rate."""
    optim = recipe.optim.model_copy(update={"lr": rate})
    return recipe.model_copy(update={"optim": optim})
