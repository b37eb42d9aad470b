"""As much of FLA's dispatch as our registration sees."""


class BaseBackend:
    backend_type = "base"
    env_var = None
    priority = 5

    def is_enabled(self):
        return True


class BackendRegistry:
    def __init__(self, operation_name):
        self.operation_name = operation_name
        self.backends = []

    def dispatch(self, function):
        def asked(*args, **kwargs):
            for backend in sorted(self.backends, key=lambda one: one.priority):
                method = getattr(backend, function.__name__, None)
                if backend.is_enabled() and method is not None and getattr(backend, f"{function.__name__}_verifier")(*args, **kwargs)[0]:
                    return method(*args, **kwargs)
            return function(*args, **kwargs)

        asked.__wrapped__ = function
        asked.registry = self
        return asked


_REGISTRIES = {}


def dispatch(operation):
    registry = _REGISTRIES.setdefault(operation, BackendRegistry(operation))
    return registry.dispatch


def register(operation):
    return lambda kind: _REGISTRIES.setdefault(operation, BackendRegistry(operation)).backends.append(kind()) or kind
