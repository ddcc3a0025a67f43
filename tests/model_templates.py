"""Chat templates as models of several formats have them, with their faults, written for these tests.

Each has the tokens that it refers to; the answers' spans are found by the strings in `ANSWERS`.
"""

HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n{"name": <name>, "arguments": <args-json-object>}<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- elif DEFAULT %}
    {{- '<|im_start|>system\\n' + DEFAULT + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or message.role == 'system' and not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- set content = (message.content or '').split('</think>')[-1].lstrip('\\n') %}
        {%- if content or not message.tool_calls %}{{- '\\n' + EMPTY + content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- RESULT }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + PROMPT }}{%- endif %}"""
GROUPED = (
    "('<|im_start|>user' if loop.previtem.role != 'tool' else '') + '\\n<tool_response>\\n' + message.content + "
    "'\\n</tool_response>' + ('<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '')"
)
OWN_ROLE = "'<|im_start|>tool\\n' + message.content + '<|im_end|>\\n'"


def chatml(default: str = "''", empty: str = "''", result: str = GROUPED, prompt: str = "''") -> str:
    """A ChatML template with Hermes's tools, a default system prompt, and what is written into answers and prompts."""
    values = {"DEFAULT": default, "EMPTY": empty, "RESULT": result, "PROMPT": prompt}
    template = HERMES
    for name, value in values.items():
        template = template.replace(name, value)
    return template


QWEN25 = chatml(default="'You are Qwen.'")
QWEN3 = chatml(empty="'<think>\\n\\n</think>\\n\\n'")
QWQ = chatml(prompt="'<think>\\n'")
TOOL_ROLE = chatml(result=OWN_ROLE)
MINIMAL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are SmolLM<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA31 = """{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') }}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}
{{- '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if loop.first and tools %}
        {{- 'Given the following functions, answer with JSON.\\n\\n' }}
        {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {%- if message.tool_calls | length > 1 %}{{- raise_exception('single tool-calls at once') }}{%- endif %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- elif role == 'ipython' %}
        {{- message.content | tojson }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS]SPACE' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]SPACE' + (system + '\\n\\n' if loop.last and system else '') + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS]SPACE[' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- 'SPACE' + message.content + eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS]SPACE{"content": ' + message.content + ', "call_id": "' + message.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

# Versions 7 and later: a system prompt of its own, and calls with or without an id.
SMALL = """{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are Small.' %}
{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name + ID + '[ARGS]' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS]' + GIVEN + message.content + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
SMALL32 = SMALL.replace("+ ID", "+ '[CALL_ID]' + call.id").replace("GIVEN", "message.tool_call_id + '[TOOL_CONTENT]'")
MINISTRAL3 = SMALL.replace("+ ID", "").replace("GIVEN + ", "")

MISTRAL01 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{- message['content'] + eos_token + ' ' }}{% else %}
{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

MIXTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- ' [INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] + eos_token }}{% else %}
{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>
' + message['content'] + eos_token + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}"""

TULU = """{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>
' + message['content'] + (eos_token if message['role'] == 'assistant' else '') + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}"""

GRANITE = """{%- if messages[0].role != 'system' %}
    {{- '<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""

S = {"bos_token": "<s>", "eos_token": "</s>"}
# name -> format, template, special tokens
TEMPLATES = {
    "Qwen2.5": ("ChatML", QWEN25, {"eos_token": "<|im_end|>"}),
    "Qwen3": ("ChatML", QWEN3, {"eos_token": "<|im_end|>"}),
    "QwQ": ("ChatML", QWQ, {"eos_token": "<|im_end|>"}),
    "a tool role": ("ChatML", TOOL_ROLE, {"eos_token": "<|im_end|>"}),
    "SmolLM2": ("ChatML", SMOLLM2, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "Llama-3.1": ("Llama-3", LLAMA31, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "Mistral v0.1": ("Mistral", MISTRAL01, S),
    "Mistral v0.3": ("Mistral", MISTRAL.replace("SPACE", " "), S),
    "Mistral Nemo": ("Mistral", MISTRAL.replace("SPACE", ""), S),
    "Mistral Small 3.2": ("Mistral", SMALL32, S),
    "Ministral 3": ("Mistral", MINISTRAL3, S),
    "Mixtral": ("Mistral", MIXTRAL, S),
    "Zephyr": ("Zephyr", ZEPHYR, S),
    "Tulu": ("Zephyr", TULU, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "Granite": ("Granite", GRANITE, {"eos_token": "<|end_of_text|>"}),
}

# Format -> a regular expression that finds every answer of a rendered chat by its header and its end.
ANSWERS = {
    "R1": r"<｜Assistant｜>(.*?<｜end▁of▁sentence｜>)",
    "ChatML": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    "Llama-3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    "Mistral": r"\[/(?:INST|TOOL_RESULTS)\]((?:(?!\[/?(?:INST|TOOL_RESULTS)\]).)*?</s>)",
    "Zephyr": r"<\|assistant\|>\n(.*?(?:</s>|<\|end_of_text\|>))",
    "Granite": r"<\|start_of_role\|>assistant<\|end_of_role\|>(.*?<\|end_of_text\|>)",
}
