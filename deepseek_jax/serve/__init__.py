"""The HTTP server: OpenAI's API and /v1/reasoning over one engine."""
