"""The README.md of an export: how to generate videos with plain transformers, its server, and vLLM. A test runs its commands."""

_TEXT = """\
# A language model with video vocabulary

{kind} with {size:,} ids, made by `larp-mllm export`. Ids below {text_size} are text, {video_start} opens a
video and {video_end} closes it, and {first_code} to {last_code} are the {codebook_size} codes of the video tokenizer. A video is
video_start, exactly {count} codes, video_end. `larp.json` holds these numbers.

## transformers

```python
import json
import torch
from transformers import AutoModelForCausalLM, {loader}

layout = json.load(open("larp.json"))
tokenizer = {loader}.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained("."{trust}).eval()

text = tokenizer.encode("a person surfing", add_special_tokens=False, split_special_tokens=True)
prompt = torch.tensor([layout["begin"] + text + [layout["video_start"]]])
codes = list(range(layout["first_code"], layout["first_code"] + layout["codebook_size"]))
count = layout["tokens_per_video"]
ids = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    prefix_allowed_tokens_fn=lambda row, so_far: codes,
    min_new_tokens=count,
    max_new_tokens=count,
    do_sample=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
)[0, prompt.shape[1]:].tolist()
```

The constraint makes it a video: exactly {count} ids, all of them codes. This is without the guidance of `larp_mllm.generate`;
transformers applies it with `guidance_scale=2.0` and `negative_prompt_ids` = begin ids and video_start, for one prompt at a
time. vLLM cannot.

## From ids to frames

With larp_mllm installed, in this folder:

```python
from larp_mllm.export.checkpoint import read_video_ids

read_video_ids(".", ids).save("surfing.mp4")
```

{serve}{vllm}## What to know

- **Untrusted text** must be encoded with `split_special_tokens=True` and joined as ids, as above: a server that encodes a
  whole string reads a typed `{start_word}` as the control token. Tokens that the base added without marking them special
  (such as `<tool_call>`) are read as such even then; `LarpMllmProcessor.encode_text` of the original model has neither gap.
- The tokens are `{start_word}`, `{end_word}` and `{code_word}`, marked special: `skip_special_tokens=False` shows them.
- The video tokenizer is in `video_tokenizer/`; the codes of another one mean something else.
- Embedding and head are separate here, even if the base had one for both.
{notes}"""
_SERVE = """\
## transformers serve

```
pip install 'transformers[serving]'
transformers serve . --trust-remote-code
curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": ".", "messages":
  [{{"role": "user", "content": "Show me a video: a person surfing"}}]}}' | larp-mllm decode-tokens . -o surfing.mp4
```

The answer holds the video as its tokens. A message may hold such tokens as well: a video of which something is asked.
`"temperature": 0` suits answers in words. With `--trust-remote-code`, `custom_generate/generate.py` makes every video exactly {count}
codes long; without it the ids of an answer are not constrained, and hardly one is a video. `/v1/completions` removes the tokens.

"""
_VLLM = """\
## vLLM

```python
from vllm import LLM, SamplingParams

llm = LLM(".")
params = SamplingParams(
    n=4, temperature=1.0, top_p=1.0, min_tokens=count, max_tokens=count, allowed_token_ids=codes, detokenize=False
)
request = llm.generate({{"prompt_token_ids": prompt[0].tolist()}}, params)[0]
videos = [list(answer.token_ids) for answer in request.outputs]  # each for read_video_ids
```

As a server, `vllm serve . --generation-config vllm`, then POST to `/v1/completions`

```
{{"model": ".", "prompt": [ids of the prompt], "temperature": 1.0, "min_tokens": {count}, "max_tokens": {count},
 "allowed_token_ids": [{first_code}, ..., {last_code}], "return_token_ids": true}}
```

and give `choices[0].token_ids` to `read_video_ids`. To caption a video, the prompt is begin ids, video_start, its codes, video_end,
and `allowed_token_ids` are the text ids, or left out.

"""
_MISSING = """- The ids {first} to {last} are tokens without a row in the base. Their rows are zero here; `generation_config.json` suppresses them
  in transformers, elsewhere forbid them when text is sampled.
"""
_OTHER_TOKENIZER = """- Read the tokenizer with `{loader}`, as above. For this kind of model AutoTokenizer, and so a server that gets
  text, splits it by the usual rules of the architecture, not by those in `tokenizer.json`: give it ids.
"""


_CUSTOM_CODE = """- The low-rank updates of the layers act at the ids of videos alone, which no stock architecture does: hence the two Python files
  here, which transformers runs with `trust_remote_code=True`. vLLM and `transformers serve` cannot load this model; one trained with
  `--joint.method lora` becomes a stock checkpoint that they can.
"""


def readme(layout: dict, architecture: str, custom_code: bool = False) -> str:
    """Return the text for a layout of larp.json; `custom_code`: the model has partial LoRA."""
    last = layout["first_code"] + layout["codebook_size"] - 1
    missing, notes = layout["missing_text_ids"], ""
    if missing:
        notes += _MISSING.format(first=missing[0], last=missing[-1])
    if layout["tokenizer_class"] != "AutoTokenizer":
        notes += _OTHER_TOKENIZER.format(loader=layout["tokenizer_class"])
    numbers = {name: layout[name] for name in ("text_size", "video_start", "video_end", "first_code", "codebook_size")}
    if custom_code:
        notes += _CUSTOM_CODE
    return _TEXT.format(
        kind=f"A `{architecture}` with partial LoRA" if custom_code else f"A stock `{architecture}`",
        trust=", trust_remote_code=True" if custom_code else "",
        serve="" if custom_code else _SERVE.format(count=layout["tokens_per_video"]),
        vllm="" if custom_code else _VLLM.format(count=layout["tokens_per_video"], last_code=last, **numbers),
        size=last + 1,
        count=layout["tokens_per_video"],
        last_code=last,
        loader=layout["tokenizer_class"],
        start_word=layout["words"]["video_start"],
        end_word=layout["words"]["video_end"],
        code_word=layout["words"]["code"].format(0),
        notes=notes,
        **numbers,
    )
