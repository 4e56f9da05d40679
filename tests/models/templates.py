"""Short chat templates in the styles of known model families."""

CHATML = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}
    {%- for call in m.tool_calls or [] %}{{ call.function.name }}: {{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Blocks of instructions around the first system message, checks of roles, text joined with `~`.
INST = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' ~ messages[0]['content'].strip() ~ '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set turns = messages %}
{%- endif %}
{%- for m in turns %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if m.role == 'user' %}
        {{- bos_token ~ '[INST] ' ~ (system ~ m['content'] if loop.first else m['content']) ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' + m['content'] + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Macros, a namespace, set blocks, reasoning that is cut out of the history, tool results side by side.
REASONING = """\
{%- macro turn(role, text) %}{{ '<|im_start|>%s\\n' % role }}{{ text }}<|im_end|>{{ '\\n' }}{% endmacro %}
{%- set ns = namespace(all='') %}
{%- for m in messages %}
    {%- set text %}
        {%- if m.role == 'assistant' and '</think>' in m.content %}
            {{- m.content.split('</think>')[-1].lstrip('\\n') }}
        {%- elif m.role == 'tool' %}
            {{- '<tool_response>' + m.content.replace('\\r', '') + '</tool_response>' }}
        {%- else %}{{ m.content }}
        {%- endif %}
    {%- endset %}
    {%- set ns.all = ns.all + turn(m.role, text) %}
{%- endfor %}
{{- [ns.all, '<|im_start|>assistant\\n' if add_generation_prompt else ''] | join }}"""

# The name of the role is part of a token; each message is formatted.
ROLE_TOKENS = """\
{%- for m in messages %}{{ '{}{}{}'.format('<|' + m.role + '|>', m.content, eos_token) }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

# Content is a list of typed parts.
PARTS = """\
{%- for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}
    {%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""

# Content is either.
BOTH = """\
{%- for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}
    {%- if m.content is string %}{{ m.content }}
    {%- else %}{% for part in m.content %}{{ part['text'] }}{% endfor %}
    {%- endif %}<|im_end|>
{%- endfor %}"""

ALL = {n: t for n, t in globals().items() if n.isupper()}
