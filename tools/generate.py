"""Continue a prompt with an exported model, by transformers alone: what any user of a Hugging Face checkpoint does.

python tools/generate.py --model demo/hf/glob --prompt "My fellow citizens, "
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from megatron_dept.common.cli import ToolParser, positive_int, run_tool
from megatron_dept.common.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(description="Continue a prompt with an exported model, by transformers alone.")
    parser.add_argument("--model", type=Path, required=True, help="a directory that convert_to_hf.py wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=positive_int, default=40, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token every time")
    parser.add_argument("--seed", type=int, default=0, help="decides the draws")
    arguments = parser.parse_args(argv)
    if not (arguments.model / "config.json").exists():
        raise ConfigError(f"--model {arguments.model} holds no config.json; write it with tools/convert_to_hf.py")
    if arguments.temperature < 0:
        raise ConfigError(f"--temperature {arguments.temperature} is below 0; give 0 or more")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    set_seed(arguments.seed)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        raise ConfigError(
            f"--prompt has no room in the model's {model.config.max_position_embeddings} tokens; shorten it"
        )
    drawn = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {"do_sample": False}
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=min(arguments.tokens, room), **drawn)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    run_tool(main)
