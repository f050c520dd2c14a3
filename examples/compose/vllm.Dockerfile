# vLLM with moe-monitor from this clone. With a release: RUN pip install "moe-monitor[otel]"
FROM vllm/vllm-openai:v0.32.0
COPY . /src/moe-monitor
RUN pip install --no-cache-dir "/src/moe-monitor[otel]"
