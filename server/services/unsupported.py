"""What becomes of request fields that this server does not act on: one rule for every endpoint that reads text.

Hints, which only advise, pass. Fields other servers know that would change the answer are refused by name, unless they
have the value that changes nothing. Every other name is refused too, with the known name that comes closest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from server.schemas.chat import ChatRequest
from server.validation import invalid, unsupported

# Fields that advise, trace or account, and those that only steer something which is off.
_HINTS = frozenset(
    {
        *(
            "user",
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "background_options",
            "access_programs",
            "client_metadata",
            "max_tool_calls",
            "cache_control",
            "inference_geo",
            "diagnostics",
            "billing_policy",
            "speed",
            "user_profile_id",
            "workspace_id",
        ),
        *("prediction", "parallel_tool_calls", "priority", "request_id", "cache_salt", "keep_alive", "provider"),
        *("id_slot", "slot_id", "n_keep", "n_discard", "timings_per_token", "return_progress"),
        *("n_cache_reuse", "sse_ping_interval", "speculative.n_max", "speculative.n_min", "speculative.p_min"),
        *("reasoning_effort", "verbosity", "include_reasoning", "separate_reasoning", "stream_interval"),
        *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "xtc_threshold", "guided_decoding_backend"),
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "guided_whitespace_pattern"),
    }
)

# Field to the values that change nothing; null and empty are always among them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # other answers
    **dict.fromkeys(
        (
            *("grammar", "regex", "ebnf", "json_schema", "structured_outputs", "structural_tag", "response_schema"),
            *("guided_choice", "guided_grammar", "guided_json", "guided_regex", "format", "response_format"),
            *("allowed_token_ids", "bad_words", "bad_words_ids", "stop_token_ids", "stop_regex", "logits_processors"),
            *("chat_template", "template", "system", "options", "context", "samplers", "sampler_order"),
            *("input_extra", "image_data", "images", "multimodal_data", "mm_processor_kwargs", "prompt_embeds"),
            *("documents", "prefix", "suffix", "web_search_options", "negative_prompt", "custom_params"),
            *("lora", "lora_path", "lora_request", "truncate_prompt_tokens", "input_ids", "input_embeds"),
            *("max_new_tokens", "max_length", "num_predict", "random_seed", "t_max_predict_ms", "thinking"),
            *("moderation", "context_management", "mcp_servers", "container", "thread", "compaction"),
            *("enable_thinking", "thinking_budget", "chat_template_kwargs", "logits_bias", "prompt_logprobs"),
        ),
        (),
    ),
    **dict.fromkeys(
        (
            *("min_tokens", "min_new_tokens", "min_length", "min_keep", "mirostat", "mirostat_mode", "dry_multiplier"),
            *("dynatemp_range", "xtc_probability", "no_repeat_ngram_size", "top_a", "epsilon_cutoff", "eta_cutoff"),
            *("penalty_alpha", "smoothing_factor", "n_probs", "top_logprobs", "n_indent"),
        ),
        (0,),
    ),
    **dict.fromkeys(
        ("length_penalty", "repetition_penalty", "tfs_z", "typical", "guidance_scale", "num_beams", "n_cmpl"), (1,)
    ),
    **dict.fromkeys(
        (
            *("continue_final_message", "include_stop_str_in_output", "use_beam_search", "early_stopping", "echo"),
            *("ban_eos_token", "temperature_last", "raw", "safe_prompt", "penalize_nl", "return_token_ids"),
            *("return_tokens", "post_sampling_probs", "return_hidden_states", "return_text_in_logprobs"),
        ),
        (False,),
    ),
    **dict.fromkeys(
        (
            *("add_generation_prompt", "skip_special_tokens", "spaces_between_special_tokens", "detokenize"),
            *("add_special_tokens", "add_bos_token", "do_sample"),
        ),
        (True,),
    ),
    **dict.fromkeys(("repeat_last_n", "penalty_last_n"), (-1,)),
    "top_n_sigma": (-1, 0),
    # of the other endpoint
    **dict.fromkeys(("prompt", "messages", "tools", "functions", "audio", "max_completion_tokens"), ()),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "response_format": ({"type": "text"},),
    # What Claude Code says: nothing of what was thought is dropped.
    "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "modalities": (["text"],),
    "best_of": (1,),
}
_CHANNEL_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that Harmony's templates do not know, as those they do."""
_TEMPLATE_VARIABLES = frozenset({"enable_thinking", "reasoning_effort", "thinking"})


def refuse_unsupported(raw: Any, kind: type[msgspec.Struct]) -> None:
    """Refuses the first field of a body that would have to be ignored although it might matter.

    Args:
      kind: what the body is read as; its fields are known.

    Raises:
      BadRequest: names the field.
    """
    for name, value in raw.items() if isinstance(raw, Mapping) else ():
        if value is None or name in _HINTS or name in kind.__struct_fields__:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None:
            raise _unknown(name, kind)
        if kind is ChatRequest and name == "add_special_tokens":
            neutral = (False,)  # a template adds its own
        same = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
        if not same and value not in ("", [], {}):
            raise unsupported(name)


def _unknown(name: str, kind: type[msgspec.Struct]) -> Exception:
    close = difflib.get_close_matches(name[:64].lower(), kind.__struct_fields__, n=1)
    return invalid(
        name[:64], f"unknown field; did you mean '{close[0]}'?" if close else "unknown field", code="unknown_field"
    )


def refuse_unsupported_chat(body: ChatRequest) -> None:
    """The same for the fields of a chat whose values decide it."""
    if body.audio:
        raise unsupported("audio")
    if body.modalities and set(body.modalities) != {"text"}:
        raise unsupported("modalities")


def template_variables(given: Mapping[str, Any] | None, *, channels: bool = False) -> dict[str, Any]:
    """The chat template variables a client may set; anything else could take over the template's own.

    Args:
      channels: whether the template is Harmony's: its models always think, more or less.
    """
    for name, value in (given or {}).items():
        if name not in _TEMPLATE_VARIABLES or not isinstance(value, bool | str | int | None):
            raise unsupported(f"chat_template_kwargs.{name[:64]}")
    variables = dict(given or {})
    if channels:
        if variables.get("enable_thinking") is False:
            variables.setdefault("reasoning_effort", "none")
        if (effort := variables.get("reasoning_effort")) is not None:
            variables["reasoning_effort"] = _CHANNEL_EFFORTS.get(effort, effort)
    return variables


def effort_variables(effort: str | None) -> dict[str, Any] | None:
    """How much the model shall think, as chat templates take it that know of such a thing."""
    if effort is None:
        return None
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
