"""Chat templates of the constructs that published ones have, rebuilt as small as they go.

The names say whose construct it is. tests/golden/chat.json has what transformers makes of
them (scripts/make/golden_chat.py).
"""

_ROUND = "{% for m in messages %}"
_END = "{% endfor %}"
_ASKS = "{% if add_generation_prompt %}"
_MARKED = (
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
)
_CHATML = (
    _ROUND + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + _END
)
_PROMPT = _ASKS + "{{ '<|im_start|>assistant\n' }}{% endif %}"
_ROLES = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles have to alternate') }}{% endif %}"
)
_SPLIT = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}"
    "{% set rest = messages %}{% endif %}"
)
_TOOL_CALLS = (
    "{% for call in m.tool_calls %}{% if call.function %}"
    "{% set call = call.function %}{% endif %}<call>"
    "{{ {'name': call.name, 'arguments': call.arguments} | tojson }}</call>{% endfor %}"
)
_TOOL_TURNS = (
    "{% if m.role == 'tool' %}{% if loop.index0 == 0 or messages[loop.index0 - 1].role"
    " != 'tool' %}<|im_start|>user{% endif %}\n<result>{{ m.content }}</result>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n"
    "{% endif %}{% elif m.tool_calls %}<|im_start|>assistant\n"
    "{% if m.content %}{{ m.content }}{% endif %}" + _TOOL_CALLS + "<|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}"
)
_LAST_QUESTION = (
    "{%- set ns = namespace(looks=true, last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}"
    "{%- set i = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.looks and m.role == 'user' and m.content is string %}"
    "{%- set ns.looks = false %}{%- set ns.last = i %}{%- endif %}{%- endfor %}"
)
_THOUGHTS = (
    _LAST_QUESTION + "{%- for m in messages %}"
    "{%- if m.content is string %}{%- set content = m.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if m.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content }}"
    "{%- if m.tool_calls %}" + _TOOL_CALLS + "{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
)
_HEADER = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"

TEMPLATES = {
    "chatml": _CHATML + _PROMPT,
    "internlm": "{{ bos_token }}" + _CHATML + _PROMPT,
    "qwen1.5": _ROUND
    + "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe kind'"
    " + '<|im_end|>\n' }}{% endif %}"
    + _CHATML.removeprefix(_ROUND)
    + _PROMPT,
    "smollm2": _ROUND
    + "{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "Short<|im_end|>\n{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content']"
    " + '<|im_end|>' + '\n'}}" + _END + _PROMPT,
    "qwen2.5": "{% if tools %}<|im_start|>system\n{% for tool in tools %}"
    "{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    + _ROUND + _TOOL_TURNS + _END + _PROMPT,
    "qwen3": _THOUGHTS
    + "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
    "qwen3 2507": _THOUGHTS + "{{- '<think>\n' }}{%- endif %}",
    "qwen3.5": _THOUGHTS
    + "{%- if enable_thinking is defined and enable_thinking is true %}"
    "{{- '<think>\n' }}{%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}",
    "llama2": _SPLIT + "{% for m in rest %}" + _ROLES
    + "{% if loop.index0 == 0 and first %}{% set text = '<<SYS>>\n' + first + "
    "'\n<</SYS>>\n\n' + m.content %}{% else %}{% set text = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}" + _END,
    "llama3": "{% set loop_messages = messages %}{% for m in loop_messages %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'+ "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    + _ASKS + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama3.1": "{{- bos_token }}{%- if custom_tools is defined %}"
    "{%- set tools = custom_tools %}{%- endif %}"
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' + date_string }}"
    "{%- if tools is not none %}{{- '\n' }}{%- for t in tools %}"
    "{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for m in messages %}{%- if 'tool_calls' in m %}"
    "{%- if not m.tool_calls|length == 1 %}{{- raise_exception('one call') }}"
    "{%- endif %}" + _HEADER + "{{- m.tool_calls[0].function.arguments | tojson }}"
    "{{- '<|eot_id|>' }}{%- elif m.role == 'tool' or m.role == 'ipython' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{%- if m.content is mapping or m.content is iterable %}"
    "{{- m.content | tojson }}{%- else %}{{- m.content }}{%- endif %}"
    "{{- '<|eot_id|>' }}{%- else %}" + _HEADER
    + "{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    "llama3.2": "{%- if strftime_now is defined %}{%- set date = strftime_now('%%') %}"
    "{%- else %}{%- set date = 'no' %}{%- endif %}{{- bos_token + date }}"
    + _CHATML + _PROMPT,
    "mistral 0.1": "{{ bos_token }}" + _ROUND + _ROLES
    + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}" + _END,
    "mistral 0.3": "{{ bos_token }}" + _SPLIT + "{% for m in rest %}"
    "{% if m.role == 'user' %}{% if first and loop.last %}"
    "{{ '[INST] ' + first + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content|trim + eos_token }}"
    "{% endif %}" + _END,
    "mistral nemo": "{%- set asked = messages|selectattr('role', 'equalto', 'user')"
    "|list %}{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if tools is not none and m == asked[-1] %}{{- '[TOOLS]' }}"
    "{{- tools | tojson }}{%- endif %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls is defined %}{%- for c in m.tool_calls %}"
    "{{- c.function|tojson }}{%- endfor %}{{- eos_token }}"
    "{%- elif m.content is defined %}{{- m.content + eos_token }}"
    "{%- endif %}{%- endfor %}",
    "mistral small": "{%- set today = strftime_now('%%') %}{{- bos_token + today }}"
    + _SPLIT + "{%- for m in rest %}{%- if m.role == 'user' %}"
    "{%- if m.content is string %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST]' }}{%- for part in m.content %}"
    "{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}"
    "{{- '[/INST]' }}{%- endif %}{%- elif m.role == 'assistant' %}"
    "{%- if m.content is string %}{{- m.content + eos_token }}"
    "{%- else %}{{- m.content[0].text + eos_token }}{%- endif %}{%- endif %}"
    "{%- endfor %}",
    "zephyr": _ROUND + "{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    + _END,
    "vicuna": "{{ bos_token }}" + _ROUND
    + "{% if m.role == 'user' %}{{ 'USER: ' + m.content.strip() + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}" + _END
    + _ASKS + "{{ 'ASSISTANT:' }}{% endif %}",
    "openchat": "{{ bos_token }}" + _ROUND
    + "{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|end|>'}}"
    + _END + _ASKS + "{{ 'GPT4 Correct Assistant:' }}{% endif %}",
    "solar": _ROUND + "{% if m.role == 'system' %}{% if m.content %}{{ '### System:\n'"
    " + m.content + '\n\n' }}{% endif %}{% elif m.role == 'user' %}"
    "{{ '### User:\n' + m.content + '\n\n' }}{% else %}{{ '### Assistant:\n' + "
    "m.content + '\n\n' }}{% endif %}" + _END
    + _ASKS + "{{ '### Assistant:\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}" + _ROUND + _ROLES
    + "{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}" + _END
    + _ASKS + "{{'<start_of_turn>model\n'}}{% endif %}",
    "gemma3": "{{ bos_token }}" + _SPLIT + "{%- for m in rest -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "(first + '\n\n' if loop.first and first else '') }}"
    "{%- if m.content is string -%}{{ m.content | trim }}"
    "{%- elif m.content is iterable -%}{%- for part in m.content -%}"
    "{%- if part.type == 'text' -%}{{ part.text | trim }}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}",
    "phi3": _ROUND + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}" + _END
    + _ASKS + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "phi4 mini": _ROUND + "{% if m.role == 'system' and 'tools' in m and m['tools'] is "
    "not none %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|tool|>' + m['tools'] + "
    "'<|end|>' }}{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endif %}" + _END
    + _ASKS + "{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "granite": "{%- if messages[0]['role'] == 'system' %}"
    "{%- set first = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set first = 'Date ' + strftime_now('%%') %}"
    "{%- if tools and documents %}{%- set first = first + ' both' %}"
    "{%- elif tools %}{%- set first = first + ' tools' %}"
    "{%- elif documents %}{%- set first = first + ' documents' %}{%- endif %}"
    "{%- set rest = messages %}{%- endif %}"
    "{{- '<|system|>' + first + '<|end|>\n' }}{%- if documents %}"
    "{%- for d in documents %}{{- d['text'] + '\n' }}{%- endfor %}{%- endif %}"
    "{%- for m in rest %}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
    "{%- endfor %}",
    "smollm3": "{%- if enable_thinking is not defined %}"
    "{%- set enable_thinking = true %}{%- endif %}"
    "{{- '<|im_start|>system\n' + ('think' if enable_thinking else 'no') + "
    "'<|im_end|>\n' -}}{%- for m in messages %}"
    "{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{% generation %}"
    "{%- if enable_thinking %}{{ '<|im_start|>assistant\n' + content.lstrip('\n') + "
    "'<|im_end|>\n' }}{%- else %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + "
    "content.lstrip('\n') + '<|im_end|>\n' }}{%- endif %}{% endgeneration %}"
    "{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}" + _PROMPT,
    "olmo2": "{{ eos_token }}" + _ROUND
    + "{% if m['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n' + "
    "m['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' + m['content'] "
    "+ eos_token }}{% endif %}{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + "
    "'\n' }}{% endif %}{% if loop.last and add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% endif %}" + _END,
    "r1 distill": "{{ bos_token }}" + _ROUND + "{% if m.role == 'user' %}{{ '<|user|>' "
    "+ m.content }}{% elif m.role == 'assistant' and m.content is not none %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + "
    "content + eos_token }}{% else %}{{ m.content }}{% endif %}" + _END
    + _ASKS + "{{ '<|assistant|><think>\n' }}{% endif %}",
    "deepseek v3": "{% set ns = namespace(is_tool=false, first='') %}"
    + _ROUND + "{% if m.role == 'system' %}{% set ns.first = ns.first + m.content %}"
    "{% endif %}" + _END + "{{ bos_token }}{{ ns.first }}" + _ROUND
    + "{% if m.role == 'user' %}{% set ns.is_tool = false %}{{ '<|user|>' + m.content "
    "+ '<|assistant|>' }}{% endif %}{% if m.role == 'tool' %}"
    "{% set ns.is_tool = true %}{{ '<result>' + m.content + '</result>' }}{% endif %}"
    "{% if m.role == 'assistant' and not m.tool_calls %}{{ m.content + eos_token }}"
    "{% endif %}" + _END,
    "deepseek v3.1": "{% if not thinking is defined %}{% set thinking = false %}"
    "{% endif %}{{ bos_token }}" + _ROUND + "{% if m.role == 'assistant' %}"
    "{{ '<|assistant|></think>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}" + _END
    + _ASKS + "{{ '<|assistant|>' + ('<think>' if thinking else '</think>') }}"
    "{% endif %}",
    "deepseek coder": "{% set ns = namespace(found=false) %}" + _ROUND
    + "{%- if m['role'] == 'system' -%}{%- set ns.found = true -%}{%- endif -%}" + _END
    + "{{bos_token}}{%- if not ns.found -%}{{ 'You code.\n' }}{%- endif %}" + _ROUND
    + "{%- if m['role'] == 'system' %}{{ m['content'] }}{%- else %}"
    "{%- if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n' }}"
    "{%- else %}{{ '### Response:\n' + m['content'] + '\n<|end|>\n' }}{%- endif %}"
    "{%- endif %}" + _END + "{% if add_generation_prompt %}{{ '### Response:' }}"
    "{% endif %}",
    "command r": "{{ bos_token }}" + _SPLIT + "{% if first != false %}{{ '<|system|>' +"
    " first + '<|end|>' }}{% endif %}{% for m in rest %}{% set content = m['content'] %}"
    "{% if m['role'] == 'user' %}{{ '<|user|>' + content.strip() + '<|end|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + content.strip() + "
    "'<|end|>' }}{% endif %}{% endfor %}" + _ASKS + "{{ '<|assistant|>' }}{% endif %}",
    "falcon3": _ROUND + "{% if m.role == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n' + m.content + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}{% else %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    + _END,
    "glm4": "[gMASK]<sop>{%- if tools -%}<|system|>\n{% for tool in tools %}\n"
    "{{ tool | tojson(ensure_ascii=False) }}\n{% endfor %}{%- endif -%}"
    "{%- macro visible(content) -%}{%- if content is string -%}{{- content }}"
    "{%- elif content is iterable and content is not mapping -%}"
    "{%- for item in content -%}{%- if item is mapping and item.type == 'text' -%}"
    "{{- item.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{% for m in messages %}{%- if m.role == 'user' -%}<|user|>\n"
    "{{ visible(m.content) }}{%- elif m.role == 'assistant' -%}<|assistant|>\n"
    "{{- '<think></think>' }}{% if visible(m.content).strip() %}"
    "{{ '\n' + visible(m.content).strip() }}{%- endif -%}{%- else -%}<|system|>\n"
    "{{ visible(m.content) }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>\n<think></think>{%- endif -%}",
    "gpt oss": "{%- macro say(role, channel, text, end) -%}{{- '<|im_start|>' + role + "
    "'<|' + channel + '|>' + text + end }}{%- endmacro -%}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- if loop.last and not add_generation_prompt -%}"
    "{%- if m.thinking -%}{{- say('assistant', 'analysis', m.thinking, '<|end|>') }}"
    "{%- endif -%}{{- say('assistant', 'final', m.content, '<|return|>') }}"
    "{%- else -%}{{- say('assistant', 'final', m.content, '<|end|>') }}{%- endif -%}"
    "{%- else -%}{{- say(m.role, 'message', m.content, '<|end|>') }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' }}"
    "{%- endif -%}",
    "nemotron": _ROUND + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n"
    "<think></think>' + m.content + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + "
    "m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}" + _END
    + _ASKS + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    "lfm2": "{{- bos_token -}}{%- set keep = keep_past_thinking | default(false) -%}"
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- set content = m['content'] -%}{%- if m['role'] == 'assistant' and not keep "
    "and loop.index0 != ns.last and '</think>' in content -%}"
    "{%- set content = content.split('</think>')[-1] | trim -%}{%- endif -%}"
    "{{- content + '<|im_end|>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
    "exaone": _ROUND + "{% if loop.first and m['role'] != 'system' %}"
    "{{ '[|system|][|endofturn|]\n' }}{% endif %}{{ '[|' + m['role'] + '|]' + "
    "m['content'] }}{% if m['role'] == 'user' %}{{ '\n' }}{% else %}"
    "{{ '[|endofturn|]\n' }}{% endif %}" + _END
    + _ASKS + "{{ '[|assistant|]' }}{% endif %}",
    "kimi": _ROUND + "{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|system|>Kim<|end|>{% endif %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{% else %}<|user|>{{ m.get('name') or m['role'] }}{% endif %}"
    "{{ m['content'] }}<|end|>" + _END + _ASKS + "<|assistant|>{% endif %}",
    "idefics": _ROUND + "{{ m['role'].capitalize() }}{% if m['content'][0]['type'] == "
    "'image' %}:{% else %}: {% endif %}{% for line in m['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}<|end|>\n"
    + _END + _ASKS + "{{ 'Assistant:' }}{% endif %}",
    "controls": _ROUND + "{%- if m.role == 'system' %}{% continue %}{% endif %}"
    "{%- if loop.index > 40 %}{% break %}{% endif %}"
    "{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}" + _END
    + _ASKS + "{{- '<|assistant|>' }}{% endif %}",
    "filters": "{% set order = messages | map(attribute='role') | unique | sort | list "
    "%}{{ order | join(',') }}{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k ~ v }}"
    "{% endfor %}{{ dict(x=1) | tojson(separators=(',', ':'), sort_keys=True) }}"
    + _CHATML + _PROMPT,
    "marks": _ROUND + _MARKED + _END + _PROMPT,
    "marks after a system": "{{ bos_token }}{% for m in messages %}{% if loop.first %}"
    "{{ 'S' }}{% endif %}" + _MARKED + _END + _PROMPT,
    "two marks a turn": _ROUND + "{%- if m.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\n' -}}{%- if m.reasoning_content -%}"
    "{%- generation -%}{{- '<think>' + m.reasoning_content + '</think>' -}}"
    "{%- endgeneration -%}{{- ' | ' -}}{%- endif -%}{%- generation -%}"
    "{{- (m.content or '') + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    "{%- endif -%}" + _END + _PROMPT,
    "marks in a macro": "{%- macro turn(m) -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content -}}"
    "{%- endgeneration -%}{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>' "
    "-}}{%- endmacro -%}{%- for m in messages -%}{{- turn(m) -}}{%- endfor -%}",
}  # fmt: skip
