"""GPT-2 and Llama of transformers compute exactly our model: logits, loss and gradients in fp32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dept.export.settings import transformers_config
from megatron_dept.export.state import to_transformers_state
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows

VOCABULARY = 61
# Logits here are of size 1 to 10; fp32 rounding over two layers is 1e-6 to 1e-5, a wrong layout shows as whole units.
TOLERANCE = 1e-4


@pytest.fixture(params=["gpt", "llama", "llama-gqa"])
def pair(request, make_config, randomised):
    """(our body, our embedding, the stock model with the same weights)."""
    config = make_config(request.param)
    body = randomised(config)
    token = init_rows(0, VOCABULARY, config.hidden_size, 0.5, "token")
    position = init_rows(0, config.seq_length, config.hidden_size, 0.5, "position") if "gpt" in request.param else None
    state = to_transformers_state(config, dict(body.named_parameters()), token, position)
    stock = AutoModelForCausalLM.from_config(transformers_config(config, VOCABULARY, eod_id=2), dtype=torch.float32)
    missing, unexpected = stock.load_state_dict({k: v.clone() for k, v in state.items()}, strict=False)
    assert unexpected == [] and missing in ([], ["lm_head.weight"])
    stock.tie_weights()
    assert stock.lm_head.weight.data_ptr() == stock.get_input_embeddings().weight.data_ptr()
    return body, SourceEmbedding(token, position, torch.float32, loss_chunk_tokens=7), stock.eval()


def test_logits_are_equal(pair):
    body, embedding, stock = pair
    ids = torch.randint(VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours = embedding.logits(body(embedding.embed(ids)))
        theirs = stock(input_ids=ids).logits
    assert ours.abs().max() > 1.0, "the comparison would mean nothing on logits near 0"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_loss_and_its_gradients_are_equal(pair):
    body, embedding, stock = pair
    ids = torch.randint(VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(6))
    loss = embedding.loss(body(embedding.embed(ids[:, :-1])), ids[:, 1:])
    loss.backward()
    expected = stock(input_ids=ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # fp32 sums in another order
    theirs = stock.get_input_embeddings().weight.grad
    # The tied table has both gradients in one: look-up and head. Relative to the tensor's norm, fp32 rounding.
    assert (embedding.token.grad - theirs).norm() < 1e-5 * theirs.norm()
    norm = {"gpt2": "transformer.ln_f.weight", "llama": "model.norm.weight"}[stock.config.model_type]
    theirs = stock.get_parameter(norm).grad
    assert (body.final_norm.weight.grad - theirs).norm() < 1e-5 * theirs.norm()
    first = {"gpt2": "transformer.h.0.ln_1.weight", "llama": "model.layers.0.input_layernorm.weight"}
    theirs = stock.get_parameter(first[stock.config.model_type]).grad
    # Behind every layer: a few times the rounding.
    assert (body.layers["0"].attention_norm.weight.grad - theirs).norm() < 1e-4 * theirs.norm()
