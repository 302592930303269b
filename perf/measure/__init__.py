"""From a workload and a backend to a recorded benchmark: tokens checked first, then rounds timed.

Nothing here judges, prints or knows a report.
"""
