"""A walk through the transformers monitor, cell by cell. Open it in an editor that knows ``# %%`` cells, or run it."""

# %% [markdown]
# A tiny random OLMoE, so that this runs anywhere. With the real one, only this cell changes:
# `model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", dtype="auto").eval()`

# %%
import torch
from transformers_compare import CODE, PROSE, quantise, run, sequences, tiny

from moe_monitor.analysis import (
    co_activation,
    compare,
    compare_choices,
    domain_specialisation,
    dynamic_k,
    vocabulary_specialisation,
)
from moe_monitor.capture.transformers import monitor

model = tiny()
prose, code = (sequences(text, None, 64) for text in (PROSE * 25, CODE * 30))

# %% [markdown]
# ## Counting
# `with monitor(model)` counts every token of every forward pass; padding by attention mask is left out.
# The model's outputs stay the same, bit for bit.

# %%
with monitor(model) as m:
    batch = torch.tensor(prose[:4])
    model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=8, do_sample=False)
m.print_summary()
print("tokens per expert, first MoE layer:", m.snapshot().counts[0].tolist())

# %% [markdown]
# ## Two texts on one model
# `record=True` keeps every token's probabilities. The verdict shuffles whole sequences between the texts, so that it
# does not take the sameness of neighbouring tokens for a difference between texts.

# %%
_, on_prose = run(model, prose, "prose")
_, on_code = run(model, code, "code")
verdict = compare(on_prose, on_code)
print(verdict)
for layer in verdict.layers:
    print(f"  layer {layer.layer}: {layer.js_bits:.3f} bits (noise alone {layer.floor_bits:.3f}), {layer.verdict}")

halves = compare(on_prose.blocks()[::2], on_prose.blocks()[1::2])
print("one text against itself:", halves.verdict)

# %% [markdown]
# ## What other rules for k would have chosen
# From the recorded probabilities; the model is not changed.

# %%
k = dynamic_k.by_mass(on_prose.probabilities, 0.8)
for layer, effect in zip(on_prose.layers, dynamic_k.effect(on_prose.probabilities, k, top_k=4), strict=True):
    print(f"layer {layer}: 80 % of the mass needs {effect['k_mean']:.1f} experts (p95 {effect['k_p95']:.0f})")

# %% [markdown]
# ## The OLMoE paper's metrics

# %%
together = co_activation(on_prose)
print("experts most often active beside expert 0 of layer 0:", (-together[0, 0]).argsort()[1:4].tolist())
specialised = domain_specialisation(on_code.counts(), on_code.tokens)
print(f"largest share of code tokens on one expert: {specialised.max():.0%} (uniform routing: {4 / 32:.0%})")
print(f"vocabulary specialisation, last layer: {vocabulary_specialisation(on_prose, on_prose.layers[-1]).mean(3):.2f}")

# %% [markdown]
# ## Before and after quantisation
# The same tokens in both runs, so every token is compared with itself.

# %%
quantise(model, bits=4)
_, after = run(model, prose, "4 bits")
print(compare_choices(on_prose, after))
