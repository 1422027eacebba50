# The worker and its served models: no Java, no torch.
FROM python:3.11-slim

WORKDIR /app
COPY requirements/run.txt requirements/run.txt
RUN pip install --no-cache-dir -r requirements/run.txt

COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && useradd --create-home tidegate

USER tidegate
CMD ["tidegate", "run"]
