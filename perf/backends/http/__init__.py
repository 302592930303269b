"""Any server that speaks OpenAI's API, as a backend: sent to when requests are due, and timed as they answer.

    target -> dialect -> prompts -> load -> connection -> events -> reply -> backend (metrics)

What real servers do differently is listed in perf/README.md, "Any server".
"""
