"""The HTTP gateway: OpenAI's API over the same sessions that gRPC serves.

`openai_requests` and `openai_replies` translate and know nothing of HTTP, `chat` renders messages
with the model's own template, `http` is the server.
"""
