"""Chat templates in the shape of those of well-known models, for the tests."""

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nAnswer with <tool_call>\\n{"name": N, "arguments": A}\\n</tool_call>' }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA = """
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}
    {{- 'Answer with {"name": N, "parameters": P}.\\n' }}
    {%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n' + message.content + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n' + message.content }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n' }}{%- endif %}
"""

MISTRAL = """
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and loop.last %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['tool_calls'] is defined and message['tool_calls'] is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message['tool_calls'] %}
            {%- if call['id'] | length != 9 %}{{- raise_exception('ids of 9 letters') }}{%- endif %}
            {{- '{"name": "' + call['function']['name'] + '", "arguments": ' }}
            {{- (call['function']['arguments'] | tojson) + ', "id": "' + call['id'] + '"}' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] ' + message['content'] + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

MISTRAL_NAMES = MISTRAL.replace("[TOOL_CALLS] [", "[TOOL_CALLS]name[ARGS]")

_TURNS = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        CALL
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

QWEN_CODER = "{%- if tools %}{{- tools | tojson }}{%- endif %}" + _TURNS.replace(
    "CALL",
    """{{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for name, value in call.function.arguments | items %}
            {{- '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) }}
            {{- '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}""",
)

GLM = "{%- if tools %}{{- tools | tojson }}{%- endif %}" + _TURNS.replace(
    "CALL",
    """{{- '\\n<tool_call>' + call.function.name + '\\n' }}
        {%- for name, value in call.function.arguments | items %}
            {{- '<arg_key>' + name + '</arg_key>\\n<arg_value>' }}
            {{- (value if value is string else value | tojson) + '</arg_value>\\n' }}
        {%- endfor %}
        {{- '</tool_call>' }}""",
)

GEMMA = """
{%- macro shown(value) %}
    {%- if value is string %}{{- '<|"|>' + value + '<|"|>' }}
    {%- elif value is mapping %}{{- '{' }}
        {%- for name, part in value | dictsort %}
            {{- (',' if not loop.first else '') + name + ':' }}{{- shown(part) }}
        {%- endfor %}{{- '}' }}
    {%- else %}{{- value | tojson }}{%- endif %}
{%- endmacro %}
{%- if tools %}{{- tools | tojson }}{%- endif %}""" + _TURNS.replace(
    "CALL",
    "{{- '<|tool_call>call:' + call.function.name }}"
    "{{- shown(call.function.arguments) }}{{- '<tool_call|>' }}",
)

LFM2 = "{%- if tools %}{{- '<|tool_list_start|>' + tools | tojson }}{%- endif %}" + _TURNS.replace(
    "CALL", "<|tool_call_start|>[{{ call.function.name }}()]<|tool_call_end|>"
)

DEEPSEEK = "{%- if tools %}{{- tools | tojson }}{%- endif %}" + _TURNS.replace(
    "CALL",
    "{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' "
    "+ call.function.arguments + '<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}",
)

KIMI = "{%- if tools %}{{- tools | tojson }}{%- endif %}" + _TURNS.replace(
    "{{- '<|im_start|>' + message.role",
    "{{- '## Return of ' + message.tool_call_id if message.role == 'tool' }}"
    "{{- '<|im_start|>' + message.role",
).replace(
    "CALL",
    "<|tool_calls_section_begin|><|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>"
    "{{ call.function.arguments }}<|tool_call_end|><|tool_calls_section_end|>",
)

HARMONY = """
{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort | default('medium') + '<|end|>' }}
{%- for tool in tools or [] %}
    {{- '<|start|>developer<|message|>// ' + tool.function.description + '\\n' + tool | tojson }}
    {{- '<|end|>' }}
{%- endfor %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if '<|channel|>analysis<|message|>' in message.content %}
            {{- raise_exception('channels in the content') }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- if message.content and message.thinking %}
                {{- raise_exception('both content and thinking before a call') }}
            {%- endif %}
            {%- if message.content or message.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' }}
                {{- (message.content or message.thinking) + '<|end|>' }}
            {%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json' }}
            {{- '<|message|>' + call.arguments | tojson + '<|call|>' }}
            {%- set last.name = call.name %}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
            {{- '<|end|>' if not loop.last or add_generation_prompt else '<|return|>' }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
