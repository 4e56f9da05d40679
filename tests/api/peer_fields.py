"""The request fields of other servers, by route. OpenAI's are not here: tests read them from its package.

vLLM's are from vllm/entrypoints/openai/{chat_completion,completion}/protocol.py at 002032ee2b18, and from
vllm/entrypoints/serve/tokenize/protocol.py at 030ea52effcb, and from
vllm/entrypoints/openai/responses/protocol.py at 010a69cea9ac.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VLLM_BOTH = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
    temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words echo
    add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval
"""
_VLLM_CHAT = """
    messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
    parallel_tool_calls add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs return_prompt_text
"""
VLLM: dict[str, frozenset[str]] = {
    "chat": _words(_VLLM_BOTH + _VLLM_CHAT),
    "completions": _words(_VLLM_BOTH + "prompt suffix prompt_embeds"),
    "/tokenize": _words(
        """
        model prompt messages add_special_tokens return_token_strs add_generation_prompt continue_final_message
        chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs tools
        """
    ),
    "responses": _words(
        """
        background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
        parallel_tool_calls previous_response_id prompt reasoning service_tier store stream temperature text
        tool_choice tools top_logprobs top_p top_k truncation user skip_special_tokens include_stop_str_in_output
        prompt_cache_key request_id mm_processor_kwargs priority cache_salt enable_response_messages
        previous_input_messages previous_response structured_outputs repetition_penalty seed stop ignore_eos
        vllm_xargs
        """
    ),
    "/detokenize": frozenset({"model", "tokens"}),
    "stream_options": frozenset({"include_usage", "continuous_usage_stats"}),
    "messages": _words("role content name tool_calls tool_call_id reasoning reasoning_content"),
}
# Fields that constrain or change the answer in earlier versions of vLLM, in SGLang and in llama.cpp.
OTHERS: dict[str, frozenset[str]] = {
    "older vLLM": _words(
        """
        best_of guided_json guided_regex guided_choice guided_grammar guided_json_object guided_decoding_backend
        guided_whitespace_pattern logits_processors max_repetition_pattern_size min_repetition_pattern_size
        repetition_min_count
        """
    ),
    "SGLang": _words("regex ebnf stop_regex custom_logit_processor lora_path return_hidden_states"),
    "llama.cpp": _words("grammar json_schema n_predict repeat_penalty typical_p mirostat"),
    "TGI": frozenset({"max_new_tokens"}),
}
