"""vLLM's own `LLM.generate` over a work file of `sampling.py`, which starts this with the Python that has vLLM."""

import json
import sys
import time

from vllm import LLM, SamplingParams

if __name__ == "__main__":
  with open(sys.argv[1]) as f:
    work = json.load(f)
  llm = LLM(work["folder"], dtype=work["dtype"], generation_config="vllm", **work["engine"])
  seconds, counts = [], []
  for run in work["runs"]:  # the first warms up
    prompts = [{"prompt_token_ids": request["ids"]} for request in run]
    params = [SamplingParams(seed=request["seed"], temperature=request["temperature"], max_tokens=work["max_tokens"],
                             stop_token_ids=work["ends"], ignore_eos=True) for request in run]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds.append(time.perf_counter() - started)
    counts = [len(output.outputs[0].token_ids) for output in outputs]
  print(json.dumps({"seconds": seconds, "counts": counts}))
