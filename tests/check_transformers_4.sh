#!/bin/sh
# The transformers monitor against transformers 4.57, in an environment of its own: CI's has 5.x, where vLLM needs it.
# Usage: tests/check_transformers_4.sh [FOLDER FOR THE ENVIRONMENT]   (default .venv-transformers4)
set -eu
cd "$(dirname "$0")/.."
env="${1:-.venv-transformers4}"
if [ ! -x "$env/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/pip" install -q torch==2.13.0 "transformers==4.57.*" accelerate pandas pyarrow opentelemetry-sdk \
        prometheus-client rich numpy packaging pytest pytest-timeout hypothesis
fi
exec "$env/bin/python" -m pytest -q -p no:cacheprovider -m "not gpu and not vllm" \
    tests/test_transformers_families.py tests/test_transformers_session.py tests/test_transformers_olmoe_facts.py \
    tests/test_transformers_latency.py
