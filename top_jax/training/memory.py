def step_memory(compiled):
    return {"total": 0}


def peak_memory():
    return None
