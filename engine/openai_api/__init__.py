"""OpenAI's API without its HTTP: what a request asks for, and the answer that it gets.

`fields` checks what a body asks for, `served_model` has an engine do it, `answers` writes what comes of it. A
server (engine/serve) and a batch file (engine/batch.py) both speak it.
"""
