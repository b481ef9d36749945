from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def capitals():
    ask = "What is the capital of {}? Answer with one word."
    pairs = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo")]
    samples = [Sample(input=ask.format(land), target=city) for land, city in pairs]
    return Task(dataset=samples, solver=generate(), scorer=includes())
