"""Runs vLLM's `LLM.generate` for `sampling.py`, which starts this program with vLLM's Python."""

import json
import os
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
  with open(sys.argv[1]) as f:
    work = json.load(f)
  llm = LLM(work["model"], dtype=work["dtype"], generation_config="vllm", **work["engine"])
  params = SamplingParams(temperature=0.0, max_tokens=work["max_tokens"], stop_token_ids=work["ends"], ignore_eos=True)
  with os.fdopen(int(sys.argv[2]), "w") as replies:
    for line in sys.stdin:
      begin, end = json.loads(line)
      outputs = llm.generate([{"prompt_token_ids": ids} for ids in work["ids"][begin:end]], params,
                             use_tqdm=False) if end > begin else []
      replies.write(json.dumps([list(output.outputs[0].token_ids) for output in outputs]) + "\n")
      replies.flush()
