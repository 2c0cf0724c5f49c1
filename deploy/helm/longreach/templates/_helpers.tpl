{{/* Names, labels and the parts that the three services' pods share. */}}

{{- define "longreach.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change. Call with (list . "component"). */}}
{{- define "longreach.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "longreach.labels" -}}
{{- $root := index . 0 -}}
{{ include "longreach.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{/* An image's full name. Call with (list . name suffix). */}}
{{- define "longreach.image" -}}
{{- $root := index . 0 -}}
{{- $tag := default $root.Chart.AppVersion $root.Values.image.tag -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end }}{{ index . 1 }}:{{ $tag }}{{ index . 2 }}
{{- end -}}

{{- define "longreach.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "longreach.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The coordinator's account: with rights, so one of its own. */}}
{{- define "longreach.coordinatorAccount" -}}
{{- if and .Values.serviceAccount.create .Values.kubernetes.enabled -}}
{{- printf "%s-coordinator" (include "longreach.serviceAccount" .) -}}
{{- else -}}
{{- include "longreach.serviceAccount" . -}}
{{- end -}}
{{- end -}}

{{- define "longreach.secretName" -}}
{{- default (printf "%s-cluster" (include "longreach.fullname" .)) .Values.clusterSecret.existingSecret -}}
{{- end -}}

{{/* How many coordinators there may be. */}}
{{- define "longreach.mostCoordinators" -}}
{{- $scaling := .Values.coordinator.autoscaling -}}
{{- ternary $scaling.maxReplicas .Values.coordinator.replicas $scaling.enabled -}}
{{- end -}}

{{/* Where workers and nodes report: every coordinator that there may be. The headless service names one before it
is ready, which it becomes only once they have reported. */}}
{{- define "longreach.coordinators" -}}
{{- $name := include "longreach.fullname" . -}}
{{- $port := ternary 7310 7300 .Values.tls.enabled -}}
{{- $addresses := list -}}
{{- range $number := until (int (include "longreach.mostCoordinators" .)) -}}
{{- $host := printf "%s-coordinator-%d.%s-coordinator-members" $name $number $name -}}
{{- $addresses = append $addresses (printf "%s.%s.svc:%d" $host $.Release.Namespace $port) -}}
{{- end -}}
{{- join "," $addresses -}}
{{- end -}}

{{/* A setting as text. Helm reads whole numbers as floats and would print 1e+06. */}}
{{- define "longreach.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* A service's settings as environment variables. */}}
{{- define "longreach.settings" -}}
{{- range $name, $value := . }}
- name: LONGREACH_{{ upper $name }}
  value: {{ include "longreach.text" $value | quote }}
{{- end }}
{{- end -}}

{{/* Where a service serves metrics, by its gRPC port. Call with (list . port). */}}
{{- define "longreach.metricsPort" -}}
{{- get (dict "7300" "9300" "7400" "9301" "7500" "9302") (toString (index . 1)) -}}
{{- end -}}

{{/* The rule of a network policy that lets metrics be read. Call with (list . port). */}}
{{- define "longreach.scrapers" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.telemetry.metrics -}}
- from:
    {{- if $root.Values.networkPolicy.scrapers }}
    {{- toYaml $root.Values.networkPolicy.scrapers | nindent 4 }}
    {{- else }}
    - namespaceSelector: {}
      podSelector:
        matchLabels:
          app.kubernetes.io/name: prometheus
    {{- end }}
  ports:
    - port: {{ include "longreach.metricsPort" . }}
{{- end -}}
{{- end -}}

{{/* Variables of all services. Call with (list . port). */}}
{{- define "longreach.commonEnvironment" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.telemetry.metrics }}
- name: LONGREACH_METRICS_LISTEN
  value: "0.0.0.0:{{ include "longreach.metricsPort" . }}"
{{- end }}
{{- with $root.Values.telemetry.otlpEndpoint }}
- name: LONGREACH_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
- name: LONGREACH_LISTEN
  value: "0.0.0.0:{{ index . 1 }}"
- name: LONGREACH_LOG_LEVEL
  value: {{ $root.Values.logLevel }}
- name: LONGREACH_LOG_FORMAT
  value: {{ $root.Values.logFormat }}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: LONGREACH_CLUSTER_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ include "longreach.secretName" $root }}
      key: {{ $root.Values.clusterSecret.key }}
{{- if $root.Values.tls.enabled }}
- name: LONGREACH_TLS_CERT
  value: /etc/longreach/tls/tls.crt
- name: LONGREACH_TLS_KEY
  value: /etc/longreach/tls/tls.key
- name: LONGREACH_TLS_CA
  value: /etc/longreach/tls/ca.crt
- name: LONGREACH_HEALTH_LISTEN
  value: "0.0.0.0:{{ add1 (index . 1) }}"
{{- end }}
{{- end -}}

{{/* Where models come from, for the worker and the coordinator. */}}
{{- define "longreach.modelEnvironment" -}}
{{- with .Values.model.tokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What the coordinator asks of the Kubernetes API. One coordinator needs no election. */}}
{{- define "longreach.kubernetesEnvironment" -}}
{{- $name := include "longreach.fullname" . -}}
{{- $scaling := .Values.retrievalNode.autoscaling -}}
{{- if .Values.kubernetes.enabled }}
- name: LONGREACH_KUBERNETES_NODE_SERVICE
  value: {{ $name }}-nodes
{{- if gt (int (include "longreach.mostCoordinators" .)) 1 }}
- name: LONGREACH_KUBERNETES_LEASE
  value: {{ $name }}-leader
{{- end }}
{{- if $scaling.enabled }}
- name: LONGREACH_KUBERNETES_NODE_SET
  value: {{ $name }}-node
- name: LONGREACH_SCALE_NODES_MIN
  value: {{ $scaling.minReplicas | quote }}
- name: LONGREACH_SCALE_NODES_MAX
  value: {{ $scaling.maxReplicas | quote }}
- name: LONGREACH_SCALE_OUT_ABOVE
  value: {{ $scaling.outAbove | quote }}
- name: LONGREACH_SCALE_IN_BELOW
  value: {{ $scaling.inBelow | quote }}
- name: LONGREACH_SCALE_IN_AFTER_S
  value: {{ include "longreach.text" $scaling.inAfterSeconds | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Ports of a container. Call with (list . port). */}}
{{- define "longreach.ports" -}}
{{- $root := index . 0 -}}
- name: grpc
  containerPort: {{ index . 1 }}
{{- if $root.Values.tls.enabled }}
- name: health
  containerPort: {{ add1 (index . 1) }}
{{- end }}
{{- if $root.Values.telemetry.metrics }}
- name: metrics
  containerPort: {{ include "longreach.metricsPort" . }}
{{- end }}
{{- end -}}

{{/* Probes of a container: it lives, it takes work. Call with (list . port service failures). */}}
{{- define "longreach.probes" -}}
{{- $root := index . 0 -}}
{{- $port := ternary (add1 (index . 1)) (index . 1) $root.Values.tls.enabled -}}
startupProbe:
  grpc:
    port: {{ $port }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ index . 3 }}
livenessProbe:
  grpc:
    port: {{ $port }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  grpc:
    port: {{ $port }}
    service: {{ index . 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end -}}

{{- define "longreach.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What every pod's spec begins with. Call with (list . section). */}}
{{- define "longreach.podSpec" -}}
serviceAccountName: {{ include "longreach.serviceAccount" (index . 0) }}
automountServiceAccountToken: false
{{ include "longreach.podSpecOfAnyAccount" . }}
{{- end -}}

{{- define "longreach.podSpecOfAnyAccount" -}}
{{- $root := index . 0 -}}
{{- $section := index . 1 -}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with $section.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $section.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $section.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Mounts of all services; `longreach.volumes` has what they mount. */}}
{{- define "longreach.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /etc/longreach/tls
  readOnly: true
{{- end }}
{{- end -}}

{{/* Call with (list . role names): the role in certificates, further DNS names. */}}
{{- define "longreach.volumes" -}}
{{- $root := index . 0 -}}
- name: tmp
  emptyDir: {}
{{- if $root.Values.tls.enabled }}
- name: tls
  csi:
    driver: csi.cert-manager.io
    readOnly: true
    volumeAttributes:
      csi.cert-manager.io/issuer-name: {{ $root.Values.tls.issuer.name }}
      csi.cert-manager.io/issuer-kind: {{ $root.Values.tls.issuer.kind }}
      csi.cert-manager.io/issuer-group: {{ $root.Values.tls.issuer.group }}
      csi.cert-manager.io/duration: {{ $root.Values.tls.duration }}
      csi.cert-manager.io/uri-names: longreach://{{ index . 1 }}/${POD_NAME}
      csi.cert-manager.io/dns-names: {{ join "," (concat (list (printf "%s.longreach.internal" (index . 1)) (printf "${POD_NAME}.%s.longreach.internal" (index . 1))) (index . 2)) }}
      csi.cert-manager.io/key-usages: digital signature,key encipherment,server auth,client auth
      csi.cert-manager.io/fs-group: "10001"
{{- end }}
{{- end -}}

{{- define "longreach.modelMounts" -}}
- name: downloads
  mountPath: /var/lib/longreach/huggingface
{{- if .Values.model.existingClaim }}
- name: models
  mountPath: /mnt/models
  readOnly: true
{{- end }}
{{- end -}}

{{- define "longreach.modelVolumes" -}}
- name: downloads
  emptyDir:
    sizeLimit: {{ .Values.model.downloads }}
{{- with .Values.model.existingClaim }}
- name: models
  persistentVolumeClaim:
    claimName: {{ . }}
    readOnly: true
{{- end }}
{{- end -}}

{{- define "longreach.scaleDown" -}}
scaleDown:
  stabilizationWindowSeconds: 600
  policies:
    - type: Pods
      value: 1
      periodSeconds: 120
{{- end -}}
