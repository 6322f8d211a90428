"""Builds a Qwen2 of 0.8 million parameters and teaches it to add, but not well.

Reinforcement learning needs a model that is right sometimes: a group whose responses are all wrong teaches nothing. So
the model is first trained on worked examples, until about 3 of 10 sampled answers are right.

    python -m examples.quickstart.build_model --output DIR [--seed N]

writes DIR/model (Hugging Face format) and DIR/data/{warm_up,train,held_out}.jsonl.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from examples.quickstart.problems import Problem, make_problem_sets, write_jsonl
from examples.quickstart.tokenizer import build_tokenizer

TARGET_ACCURACY = 0.30
MAX_ITERATIONS = 2000
EVALUATE_EVERY = 10
PRINT_EVERY = 50
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
ADAM_BETAS = (0.9, 0.98)  # with 0.999 some seeds need twice the iterations
MAX_RESPONSE_TOKENS = 4  # three digits and the end of sequence
IGNORED = -100  # the label that transformers' loss leaves out


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, from torch's random state."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
    )


def encode_prompts(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> torch.Tensor:
    """[N, P] int64. All questions have five characters, so no prompt needs padding."""
    chats = [problem.as_row()["prompt"] for problem in problems]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=False)


def encode_examples(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, both [N, L] int64; only the answer and the EOS after it are learned."""
    answers = tokenizer(
        [problem.answer + tokenizer.eos_token for problem in problems], padding=True, padding_side="right"
    )
    answer_ids, answer_mask = torch.tensor(answers["input_ids"]), torch.tensor(answers["attention_mask"])
    prompt_ids = encode_prompts(tokenizer, problems)
    labels = torch.cat([torch.full_like(prompt_ids, IGNORED), answer_ids.masked_fill(answer_mask == 0, IGNORED)], dim=1)
    return torch.cat([prompt_ids, answer_ids], dim=1), labels


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> float:
    """Share of right answers, one sampled at temperature 1 for each problem."""
    prompt_ids = encode_prompts(tokenizer, problems)
    generated = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=MAX_RESPONSE_TOKENS,
    )
    responses = tokenizer.batch_decode(generated[:, prompt_ids.shape[1] :], skip_special_tokens=True)
    return sum(r == p.answer for r, p in zip(responses, problems, strict=True)) / len(problems)


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Problem],
    probe: list[Problem],
) -> None:
    """Supervised training on the examples until TARGET_ACCURACY on the probe problems.

    Raises RuntimeError when MAX_ITERATIONS do not suffice.
    """
    input_ids, labels = encode_examples(tokenizer, examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS)
    started = time.monotonic()
    for iteration in range(1, MAX_ITERATIONS + 1):
        batch = torch.randint(len(examples), (BATCH_SIZE,))
        loss = model(input_ids=input_ids[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % EVALUATE_EVERY == 0:
            accuracy = sampled_accuracy(model, tokenizer, probe)
            done = accuracy >= TARGET_ACCURACY
            if done or iteration % PRINT_EVERY == 0:
                seconds = time.monotonic() - started
                print(
                    f"iteration {iteration:4d}   loss {loss.item():.3f}   accuracy {accuracy:6.1%}   {seconds:4.0f} s"
                )
            if done:
                return
    raise RuntimeError(
        f"accuracy is still below {TARGET_ACCURACY:.0%} after {MAX_ITERATIONS} iterations: try another --seed"
    )


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Build the quick start's model and problems.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    disable_progress_bar()
    torch.set_num_threads(1)  # so that a seed gives the same model whatever the number of cores
    torch.manual_seed(arguments.seed)
    problem_sets = make_problem_sets(arguments.seed)
    data = arguments.output / "data"
    write_jsonl(data / "warm_up.jsonl", problem_sets.warm_up)
    write_jsonl(data / "train.jsonl", problem_sets.train)
    write_jsonl(data / "held_out.jsonl", problem_sets.held_out)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    # The problems that CE-GPPO will train on tell when to stop: the held-out ones must not influence anything.
    probe = problem_sets.train[:512]
    warm_up(model, tokenizer, problem_sets.warm_up, probe)

    tokenizer.save_pretrained(arguments.output / "model")
    model.save_pretrained(arguments.output / "model")


if __name__ == "__main__":
    main()
