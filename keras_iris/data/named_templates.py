"""Chat templates that `ChatTemplate.named` knows, by name.

Each entry is (Jinja source, start token, end token), `None` where the format
has none of its own and writes the tokenizer's.
"""

# Zephyr-7B: </s> after every turn.
ZEPHYR = """\
{{- bos_token }}
{%- for message in messages %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
"""

# Qwen, SmolLM2 and others. No system message is added of its own.
CHATML = """\
{{- bos_token }}
{%- for message in messages %}
{{ '<|im_start|>' + message['role'] }}
{{ message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- raise_exception('Gemma has no system role') }}
{%- endif %}
{%- set role = message['role'] | replace('assistant', 'model') %}
{{- '<start_of_turn>' + role + '\n' }}
{{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\n' }}
{%- endif %}
"""

# The texts as they stand, with an end token after assistant turns.
PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
{{- message['content'] }}
{%- if message['role'] == 'assistant' %}
{{- eos_token }}
{%- endif %}
{% endfor %}
"""

# SPIN (arXiv 2401.01335), as in its published code.
SPIN = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '### Instruction: ' + message['content'] + '\n\n### Response: ' }}
{%- elif message['role'] == 'assistant' %}
{{- message['content'] + eos_token }}
{{- '' if loop.last else '\n\n' }}
{%- else %}
{{- message['content'] + '\n\n' }}
{%- endif %}
{%- endfor %}
"""

NAMED_TEMPLATES = {
    "zephyr": (ZEPHYR, None, "</s>"),
    "chatml": (CHATML, None, "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "gemma": (GEMMA, "<bos>", "<eos>"),
    "plain": (PLAIN, None, None),
    "spin": (SPIN, None, None),
}
