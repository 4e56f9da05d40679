# requires: llm
# A model of the command `llm` by its own configuration file.
export LLM_USER_PATH=$(mktemp -d)
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<END
- model_id: here
  model_name: $LLUMD_MODEL
  api_base: $LLUMD_URL/v1
  supports_tools: true
  supports_schema: true
END
report() { # NAME COMMAND...
    name=$1
    shift
    if out=$("$@" 2>&1); then echo "{\"check\": \"$name\", \"ok\": true, \"why\": \"\"}"
    else echo "{\"check\": \"$name\", \"ok\": false, \"why\": $(printf %s "$out" | tail -1 | "$VENV/bin/python" -c 'import json, sys; print(json.dumps(sys.stdin.read()))')}"; fi
}
export OPENAI_API_KEY=any
report chat "$VENV/bin/llm" -m here -o max_tokens 8 "Say hi."
report chat_whole "$VENV/bin/llm" -m here --no-stream -s "Be brief." -o max_tokens 8 "Say hi."
report schema "$VENV/bin/llm" -m here -o max_tokens 60 --schema "name, age int" "A dog."
report tools "$VENV/bin/llm" -m here -o max_tokens 30 -T llm_version "Which version?"
rm -rf "$LLM_USER_PATH"
