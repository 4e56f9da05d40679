# requires: llama-index-llms-openai-like
from checks import BASE, KEY, MODEL, check, main
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

OPTIONS = {"model": MODEL, "api_base": BASE, "api_key": KEY, "max_tokens": 60, "max_retries": 0}
chat_model = OpenAILike(is_chat_model=True, is_function_calling_model=True, **OPTIONS)


@check
def chat():
    assert chat_model.chat([ChatMessage(role="user", content="Say hi.")]).message.content is not None


@check
def stream():
    assert list(chat_model.stream_chat([ChatMessage(role="user", content="Say hi.")]))


@check
def completions():
    assert OpenAILike(is_chat_model=False, **OPTIONS).complete("a").text is not None


@check
def tools():
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    answer = chat_model.chat_with_tools(
        [FunctionTool.from_defaults(add)], user_msg="Add 1 and 2.", tool_required=True
    )
    assert chat_model.get_tool_calls_from_response(answer)[0].tool_name == "add"


main()
