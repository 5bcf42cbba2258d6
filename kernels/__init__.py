WORKSPACE: dict = {}
FLOPS: dict = {}
