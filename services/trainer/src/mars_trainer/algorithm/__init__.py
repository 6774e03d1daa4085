"""The method as pure functions: nothing here knows of settings, queues or HTTP."""
