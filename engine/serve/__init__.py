"""An engine behind HTTP: OpenAI's endpoints (engine/openai_api) as an ASGI application, and its process.

`app` is between HTTP and the engine, `guard` stands in front, `responses` are what is not streamed,
`prometheus` tells of it, `command` runs it. The rules that real clients impose are stated where they are
kept.
"""
